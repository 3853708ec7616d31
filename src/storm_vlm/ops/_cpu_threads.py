"""Runs a compiled kernel on as many threads as torch uses, this one among them.

On Linux they are the OpenMP threads of torch itself: between two of its operations these wait by spinning, and threads of our
own would share the cores with them (twice the time of a mixer). Where torch has no such threads, and in
a forked child, which has lost them, Python threads of this process run the kernels.
"""

import ctypes
import functools
import itertools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from storm_vlm.ops._cpu_compile import Kernel
from storm_vlm.ops._cpu_layout import ROW_BYTES

# For each sample of a thread's share: the sample, the first and the end of its parts.
Share = list[tuple[int, int, int]]
_Calls = list[tuple[int, int, int, int, int]]
_PROCESS = os.getpid()
_RUN_TEAM = Kernel("_cpu_team_kernel", "run_team", num_integers=1)


class _OpenMP(NamedTuple):
    """Functions of the OpenMP library that torch has loaded."""

    parallel: Any
    num_threads: int
    thread_number: int


def shares_of(num_samples: int, num_parts: int, *, worth: int) -> list[Share]:
    """Cuts the parts of all samples into one share of neighbours for each thread.

    Args:
        num_samples: Number of samples.
        num_parts: Number of parts of each sample.
        worth: Number of threads that the work is worth.

    Returns:
        Each thread's share.
    """
    work = num_samples * num_parts
    threads = max(1, min(torch.get_num_threads(), work, worth))
    shares = []
    for first, end in itertools.pairwise(work * i // threads for i in range(threads + 1)):
        samples = range(first // num_parts, -(-end // num_parts))
        shares.append(
            [(i, max(first - i * num_parts, 0), min(end - i * num_parts, num_parts)) for i in samples]
        )
    return shares


def run_shares(kernel: Kernel, descriptor: np.ndarray, shares: Sequence[Share], scratch_bytes: int) -> None:
    """Runs a kernel over all shares at once.

    Args:
        kernel: What to run.
        descriptor: What it works on, int64.
        shares: Work of each thread.
        scratch_bytes: Scratch memory that each thread needs.
    """
    scratch_bytes = -(-scratch_bytes // ROW_BYTES) * ROW_BYTES
    memory = np.empty(len(shares) * scratch_bytes + ROW_BYTES, dtype=np.uint8)
    scratch = -(-memory.ctypes.data // ROW_BYTES) * ROW_BYTES
    calls: list[_Calls] = [
        [(descriptor.ctypes.data, scratch + i * scratch_bytes, *work) for work in share]
        for i, share in enumerate(shares)
    ]
    with torch.profiler.record_function(f"storm::{kernel.name}"):
        if len(calls) == 1:
            _run_calls(kernel, calls[0])
        elif os.getpid() == _PROCESS and (openmp := _openmp()) is not None:
            _run_on_openmp(openmp, kernel, calls)
        else:
            _run_on_own_threads(kernel, calls)


def _run_calls(kernel: Kernel, calls: _Calls) -> None:
    for arguments in calls:
        kernel.call(*arguments)


def _run_on_own_threads(kernel: Kernel, calls: list[_Calls]) -> None:
    others = [_threads(os.getpid()).submit(_run_calls, kernel, share) for share in calls[1:]]
    _run_calls(kernel, calls[0])
    for other in others:
        other.result()


def _run_on_openmp(openmp: _OpenMP, kernel: Kernel, calls: list[_Calls]) -> None:
    """Gives each thread of a team its share."""
    ends = list(itertools.accumulate(len(share) for share in calls))
    head = [kernel.address, openmp.num_threads, openmp.thread_number, len(calls), 0, *ends]
    team = np.array([*head, *itertools.chain(*itertools.chain(*calls))], dtype=np.int64)
    openmp.parallel(_RUN_TEAM.address, team.ctypes.data, len(calls), 0)


@functools.cache
def _openmp() -> _OpenMP | None:
    """Returns the OpenMP library of torch, None where it has none with GNU's entry point."""
    if sys.platform != "linux":
        return None
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    library = ctypes.CDLL(str(bundled[0]) if bundled else None)
    try:
        parallel = library.GOMP_parallel
        num_threads, thread_number = library.omp_get_num_threads, library.omp_get_thread_num
    except AttributeError:
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return _OpenMP(parallel, _address(num_threads), _address(thread_number))


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Returns the threads of a process: those of a parent do not survive a fork."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix=f"storm-scan-{process}")
