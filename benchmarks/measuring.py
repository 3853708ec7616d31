"""Times a call and the peak of resident memory while it runs; what several benchmarks share."""

import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch


def timed(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """Returns what the work returns, the seconds it took, and the most memory above that before it, in bytes."""
    gc.collect()
    before = _reset_peak()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return result, seconds, _peak() - before


def machine() -> dict[str, Any]:
    """Returns what a reader of the figures must know."""
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def _reset_peak() -> int:
    """Gives freed memory back and sets the peak resident memory to the present one, where the system allows it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")
    return psutil.Process().memory_info().rss


def _peak() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return psutil.Process().memory_info().rss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
