"""Compiles the kernels of the CPU backend when they are first run, and keeps the machine code on disk.

Numba turns a kernel's source into LLVM's language once; from then on the machine code is loaded without Numba, whose start
takes longer than most scans. The files are named after the digest of the sources, the compiler and the processor, so that
one that does not fit is never loaded.
"""

import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import binding as llvm

from storm_vlm.storage import atomic_file, cache_directory

logger = logging.getLogger(__name__)

_CHECK_BYTES = hashlib.sha256().digest_size
# What machine code may call: LLVM emits these for copies and constants.
_LIBRARY_FUNCTIONS = {"memcpy", "memset", "memmove"}


class Kernel:
    """A function of 64-bit integers that runs without the interpreter; compiled or loaded when it is first needed.

    Args:
        module: Module of the source, beside this one.
        name: Name of the function.
        num_integers: Number of its arguments.
    """

    def __init__(self, module: str, name: str, *, num_integers: int = 5) -> None:
        self.name = name
        self._module = module
        self._num_integers = num_integers

    @functools.cached_property
    def address(self) -> int:
        """Address of the C function."""
        return self._engine.get_function_address(self.name)

    @functools.cached_property
    def call(self) -> Callable[..., None]:
        """The C function; it does not hold the GIL."""
        return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * self._num_integers)(self.address)

    @property
    def path(self) -> Path:
        """File of the machine code."""
        return cache_directory() / "kernels" / f"{self.name}-{_digest()}.o"

    @functools.cached_property
    def _engine(self) -> Any:
        """What holds the machine code in memory."""
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
        engine.add_object_file(llvm.ObjectFileRef.from_data(self._machine_code()))
        engine.finalize_object()
        return engine

    def _machine_code(self) -> bytes:
        """Returns the machine code from disk, where a whole file is, or compiles it."""
        if self.path.is_file():
            kept = self.path.read_bytes()
            check, code = kept[:_CHECK_BYTES], kept[_CHECK_BYTES:]
            if check == hashlib.sha256(code).digest():
                return code
        code = self._compile()
        try:
            with atomic_file(self.path) as file:
                file.write_bytes(hashlib.sha256(code).digest() + code)
        except OSError as error:
            logger.warning("the selective scan will be compiled again in each process: %s", error)
        return code

    def _compile(self) -> bytes:
        from numba import cfunc, types

        function = getattr(importlib.import_module(f"storm_vlm.ops.{self._module}"), self.name)
        signature = types.void(*[types.int64] * self._num_integers)
        compiled = cfunc(signature, error_model="numpy")(function)
        source = self._with_plain_entry(compiled.inspect_llvm(), compiled.native_name)
        return _target_machine().emit_object(llvm.parse_assembly(source))

    def _with_plain_entry(self, source: str, numba_entry: str) -> str:
        """Replaces Numba's entry, which reports exceptions to the interpreter, by one that a kernel needs."""
        source = re.sub(rf"^define [^@]*@{re.escape(numba_entry)}\(.*?^}}\n", "", source, flags=re.M | re.S)
        native = numba_entry.removeprefix("cfunc.")
        called = set(re.findall(r"call [^@\n]*@([\w.]+)\(", source)) - _LIBRARY_FUNCTIONS - {native}
        raises = set(re.findall(r"^  ret i32 (.*)$", source, re.M)) - {"0"}
        if raises or any(not name.startswith("llvm.") for name in called):
            raise RuntimeError(f"{self.name} may raise or calls {sorted(called)}: a kernel must do neither")
        numbers = [f"i64 %{i}" for i in range(self._num_integers)]
        return source + (
            f"\ndefine void @{self.name}({', '.join(numbers)}) {{\n"
            f"  %result = alloca ptr\n"
            f"  call i32 @{native}(ptr %result, ptr null, {', '.join(numbers)})\n"
            f"  ret void\n}}\n"
        )


@functools.cache
def _digest() -> str:
    """Names the sources, the compiler and the processor."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("_cpu_*.py")):
        digest.update(source.read_bytes())
    versions = [importlib.metadata.version(package) for package in ("numba", "llvmlite")]
    processor = [llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    digest.update("\n".join([*versions, *processor]).encode())
    return digest.hexdigest()[:16]


def _target_machine() -> Any:
    """Returns a compiler for this processor."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="jitdefault",
        jit=True,
    )
