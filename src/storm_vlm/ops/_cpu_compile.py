"""Compiles the kernels of the CPU backend to C functions when they are first run, and caches them on disk."""

import ctypes
import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import cfunc, types

logger = logging.getLogger(__name__)

# What a kernel takes: addresses of its descriptor and of scratch memory, a sample, and the first and the end of its parts.
_KERNEL_TYPE = types.void(*[types.int64] * 5)


class Kernel:
    """A function of five integers that runs without the interpreter; compiled when its address is first asked for."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.name = function.__name__
        self._function = function

    @functools.cached_property
    def address(self) -> int:
        """Address of the C function."""
        return self.compiled.address

    @functools.cached_property
    def call(self) -> Callable[..., None]:
        """The C function; it does not hold the GIL."""
        return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(self.address)

    @functools.cached_property
    def compiled(self) -> Any:
        """Numba's C function."""
        return compile_cached(self._function, _KERNEL_TYPE)


def compile_cached(function: Callable[..., None], signature: Any) -> Any:
    """Compiles a function to C, and caches it on disk under the digest of all sources of the backend.

    Numba alone would look at one file only, and miss a change in the others.

    Args:
        function: What to compile.
        signature: Its Numba signature.

    Returns:
        Numba's C function.
    """
    sources = sorted(Path(__file__).parent.glob("_cpu_*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    function.__qualname__ += f"_{digest}"
    try:
        return cfunc(signature, cache=True, error_model="numpy")(function)
    except RuntimeError as error:
        logger.warning("the selective scan will be compiled again in each process: %s", error)
        return cfunc(signature, error_model="numpy")(function)
