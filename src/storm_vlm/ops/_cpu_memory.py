"""Large pages for large results: with pages of 4 KiB, the faults of fresh memory cost a third of the CPU scan."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch

# Below this the pages of a result are few, and the allocator reuses them.
_LEAST_BYTES = 2**22


def on_large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Asks Linux to put memory that nobody has written yet on large pages; a hint, which may change nothing."""
    advise = _madvise()
    if advise is None or tensor.nbytes < _LEAST_BYTES:
        return tensor
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    num_bytes = tensor.data_ptr() + tensor.nbytes - start
    advise(start, num_bytes // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return tensor


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Returns the C library's madvise where it knows large pages."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
