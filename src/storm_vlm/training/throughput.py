"""What a run costs: samples and tokens a second, the share of time spent waiting for data, peak memory."""

import resource
import time
from collections.abc import Iterator
from typing import Any

import torch

_KIBIBYTE = 1024
_PADDING_MASK_DIMS = 2


class Throughput:
    """Measures between two lines of the log, for one process."""

    def __init__(self) -> None:
        self._reset()

    def count(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yields batches, measuring how long each is waited for and what it holds."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited_seconds += time.perf_counter() - start
            if "input_ids" in batch:
                self._num_samples += batch["input_ids"].shape[0]
                mask = batch["attention_mask"]
                # Of a mask for pairs of tokens: every token but padding attends to the first.
                self._num_tokens += (mask if mask.ndim == _PADDING_MASK_DIMS else mask[..., 0]).sum()
            yield batch

    def take(self) -> dict[str, float]:
        """Returns the figures since the last call and begins anew; tokens are counted without padding."""
        seconds = time.perf_counter() - self._start
        figures = {
            "samples_per_second": round(self._num_samples / seconds, 4),
            "tokens_per_second": round(int(self._num_tokens) / seconds, 2),
            "data_wait_share": round(self._waited_seconds / seconds, 4),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        self._reset()
        return figures

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._waited_seconds = 0.0
        self._num_samples = 0
        self._num_tokens: int | torch.Tensor = 0


def peak_memory_bytes() -> int:
    """Returns the most memory that this process has had: of its GPU if there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIBIBYTE
