"""The most memory that work takes over what was in use before it."""

import ctypes
import gc
import sys
from pathlib import Path

import psutil
import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
# What Linux takes as "set the peak resident set to the present one".
_RESET_PEAK = "5"


class PeakMemory:
    """Peak memory over idle: of a GPU what PyTorch has allocated, else the resident set, which only Linux records.

    It costs the work nothing, as the system keeps the peak.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._idle_bytes: int | None = None

    def start(self) -> None:
        """Gives freed memory back and notes what is in use."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._idle_bytes = torch.cuda.memory_allocated(self._device)
        else:
            self._idle_bytes = _reset_resident_peak()

    def over_idle_bytes(self) -> int | None:
        """Returns the peak since the start over what was in use then; None where the system records none."""
        if self._idle_bytes is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._idle_bytes
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return max(0, int(line.split()[1]) * 1024 - self._idle_bytes)


def _reset_resident_peak() -> int | None:
    """Returns the resident set once its peak is set to it; None where the system does not allow that."""
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return None
    return psutil.Process().memory_info().rss
