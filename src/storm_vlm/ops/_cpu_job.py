"""One scan in the layout of the CPU kernels: where its tensors lie, its tables, and the threads that share it.

Shapes: ``b`` batch, ``l`` sequence, ``d`` channels in ``g`` groups, ``n`` state size; tables ``(b, tile, n, 16)`` with n
padded to a multiple of four and each group's channels to one of 16.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from storm_vlm.ops._cpu_elements import BFLOAT16, FLOAT16, FLOAT32
from storm_vlm.ops._cpu_layout import CHUNK_STEPS, PLANES, SLAB_TILES, Plane, Problem, Weights, scratch_bytes
from storm_vlm.ops._cpu_memory import on_large_pages
from storm_vlm.ops._cpu_vector import LANES, ROW_BYTES, STATES

_CODES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
# State updates that are worth a thread of their own: about 0.1 ms (ours).
_UPDATES_PER_THREAD = 2**19
_NO_PLANE = Plane(0, 0, 0, 0, 0)

Kernel = Callable[[np.ndarray, int, int, int, int], None]


class Job:
    """The inputs of one scan, brought into the layout of the kernels; it owns what their addresses point to."""

    def __init__(
        self,
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        *,
        delta_softplus: bool,
        reverse: bool,
    ) -> None:
        self.b, self.d, self.length = u.shape
        self.n = A.shape[1]
        self.groups = max(weights.shape[1] if weights.ndim == 4 else 1 for weights in (B, C))
        self.group_tiles = -(-self.d // (self.groups * LANES))
        self.group_slabs = -(-self.group_tiles // SLAB_TILES)
        self.states = -(-self.n // STATES) * STATES
        self.chunks = -(-self.length // CHUNK_STEPS)
        self._owned: list[torch.Tensor] = []
        self._planes = {"u": self._plane(u), "delta": self._plane(delta), "z": self._plane(z)}
        self._fields = {
            "is_gated": int(z is not None),
            "B": self._weights(B),
            "C": self._weights(C),
            "length": self.length,
            "groups": self.groups,
            "group_channels": self.d // self.groups,
            "states": self.states,
            "softplus": int(delta_softplus),
            "reverse": int(reverse),
            "A": self._address(self.to_tiles(A.to(torch.float32)[None] * math.log2(math.e))),
            "D": self._channels_table(D),
            "delta_bias": self._channels_table(delta_bias),
            "batches": self.b,
        }

    def run(
        self,
        kernel: Kernel,
        *,
        planes: dict[str, torch.Tensor | None],
        tables: dict[str, torch.Tensor | None],
    ) -> None:
        """Runs a kernel over all tiles on as many threads as torch uses, this one among them."""
        all_planes = self._planes | {name: self._plane(tensor) for name, tensor in planes.items()}
        fields = self._fields | {name: self._address(table) for name, table in tables.items()}
        values: list[Any] = [all_planes.get(name, _NO_PLANE) for name in PLANES]
        values += [fields.get(name, 0) for name in Problem._fields]
        flat = [number for value in values for number in (value if isinstance(value, tuple) else (value,))]
        descriptor = np.array(flat, dtype=np.int64)
        shares = list(self._shares())
        others = [
            _threads(os.getpid()).submit(_run_share, kernel, descriptor, share, self.states)
            for share in shares[1:]
        ]
        try:
            _run_share(kernel, descriptor, shares[0], self.states)
        finally:
            for other in others:
                other.result()

    def zeros_of_states(self) -> torch.Tensor:
        """Returns a table with a number for each state."""
        return torch.zeros(self.b, self.groups * self.group_tiles, self.states, LANES)

    def zeros_of_channels(self) -> torch.Tensor:
        """Returns a table with a number for each channel."""
        return torch.zeros(self.b, self.groups * self.group_tiles, 1, LANES)

    def empty_checkpoints(self) -> torch.Tensor:
        """Returns room for the state before each chunk."""
        tiles = self.groups * self.group_tiles
        return on_large_pages(torch.empty(self.b, self.chunks, tiles, self.states, LANES))

    def zeros_of_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Returns room for the sums of the gradient of B or C, slab by slab, or by state if constant in time."""
        if weights.ndim == 2:
            return self.zeros_of_states()
        sums = torch.empty(self.group_slabs, self.b, self.groups, self.length, self.states)
        return on_large_pages(sums)

    def weights_gradient(self, sums: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Brings the sums into the shape of B or C."""
        if weights.ndim == 2:
            return self.from_tiles(sums).sum(dim=0)
        gradient = sums.sum(dim=0)[..., : self.n].transpose(2, 3)  # (b, g, l, n) -> (b, g, n, l)
        if weights.ndim == 3 or weights.shape[1] != self.groups:
            gradient = gradient.sum(dim=1, keepdim=True)
        return gradient.reshape(weights.shape) if weights.ndim == 4 else gradient.squeeze(1)

    def to_tiles(self, states: torch.Tensor) -> torch.Tensor:
        """Brings ``(b, d, n)`` into a table, with zeros where it is padded."""
        return self._table(functional.pad(states.to(torch.float32), (0, self.states - self.n)))

    def from_tiles(self, table: torch.Tensor) -> torch.Tensor:
        """Brings a table back to ``(b, d, n)``, or ``(b, d, 1)`` where it has one number for each channel."""
        by_group = table.unflatten(1, (self.groups, -1)).transpose(3, 4).flatten(2, 3)  # (b, g, e, n)
        n = self.n if table.shape[2] == self.states else 1
        return by_group[:, :, : self.d // self.groups, :n].flatten(1, 2)

    def readable(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the tensor itself, or a copy where no dimension is contiguous or no kernel reads the dtype."""
        if tensor.dtype not in _CODES:
            tensor = tensor.to(torch.float32)
        return tensor if 1 in tensor.stride()[1:] else tensor.contiguous()

    def _plane(self, tensor: torch.Tensor | None) -> Plane:
        if tensor is None:
            return _NO_PLANE
        tensor = self.readable(tensor)
        strides = [stride * tensor.element_size() for stride in tensor.stride()]
        return Plane(self._address(tensor), _CODES[tensor.dtype], *strides)

    def _weights(self, weights: torch.Tensor) -> Weights:
        if weights.ndim == 2:
            table = self.to_tiles(weights[None])
            return Weights(self._address(table), 0, 0, 0)
        by_step = (weights if weights.ndim == 4 else weights[:, None]).transpose(
            2, 3
        )  # (b, g, n, l) -> (b, g, l, n)
        as_it_is = by_step.dtype == torch.float32 and self.n == self.states and by_step.stride(3) == 1
        if not as_it_is or by_step.stride(2) == 0:
            by_step = functional.pad(by_step.to(torch.float32), (0, self.states - self.n)).contiguous()
        batch, group, step, _ = (4 * stride for stride in by_step.stride())
        return Weights(self._address(by_step), batch, 0 if by_step.shape[1] == 1 else group, step)

    def _channels_table(self, values: torch.Tensor | None) -> int:
        if values is None:
            return self._address(self.zeros_of_channels())
        return self._address(self._table(values.to(torch.float32)[None, :, None]))

    def _table(self, values: torch.Tensor) -> torch.Tensor:
        """Brings ``(b, d, k)`` into tiles, ``(b, tile, k, 16)``."""
        grouped = values.unflatten(1, (self.groups, -1))  # (b, g, e, k)
        padded = functional.pad(grouped, (0, 0, 0, self.group_tiles * LANES - grouped.shape[2]))
        return padded.unflatten(2, (-1, LANES)).transpose(3, 4).flatten(1, 2).contiguous()

    def _address(self, tensor: torch.Tensor | None) -> int:
        if tensor is None:
            return 0
        self._owned.append(tensor)
        return tensor.data_ptr()

    def _shares(self) -> Iterator[list[tuple[int, int, int]]]:
        """Yields each thread's work: sample, first tile and end tile of neighbouring slabs."""
        slabs = self.groups * self.group_slabs
        updates = self.b * slabs * SLAB_TILES * LANES * self.states * self.length
        threads = max(1, min(torch.get_num_threads(), self.b * slabs, updates // _UPDATES_PER_THREAD))
        bounds = [self.b * slabs * i // threads for i in range(threads + 1)]
        for first, end in itertools.pairwise(bounds):
            samples = range(first // slabs, -(-end // slabs))
            yield [
                (
                    i,
                    self._first_tile(max(first - i * slabs, 0)),
                    self._first_tile(min(end - i * slabs, slabs)),
                )
                for i in samples
            ]

    def _first_tile(self, slab: int) -> int:
        group, place = divmod(slab, self.group_slabs)
        return group * self.group_tiles + place * SLAB_TILES


def _run_share(
    kernel: Kernel, descriptor: np.ndarray, share: list[tuple[int, int, int]], states: int
) -> None:
    """Runs a kernel over some tiles with scratch memory of its own."""
    memory = np.empty(scratch_bytes(states), dtype=np.uint8)
    scratch = -(-memory.ctypes.data // ROW_BYTES) * ROW_BYTES
    for sample, first_tile, end_tile in share:
        kernel(descriptor, scratch, sample, first_tile, end_tile)


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Returns the threads of a process: those of a parent do not survive a fork."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix=f"storm-scan-{process}")
