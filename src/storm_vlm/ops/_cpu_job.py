"""One scan in the layout of the CPU kernels: where its tensors lie, its tables, and the threads that share it.

Shapes: ``b`` batch, ``l`` sequence, ``d`` channels in ``g`` groups, ``n`` state size, ``r`` rank of the time steps; tables
``(b, tile, n, 16)`` with n padded to a multiple of four and each group's channels to one of 16.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from storm_vlm.ops._cpu_compile import Kernel
from storm_vlm.ops._cpu_layout import (
    CHUNK_STEPS,
    LANES,
    PLANES,
    SLAB_TILES,
    STATES,
    Problem,
    Weights,
    scratch_bytes,
)
from storm_vlm.ops._cpu_memory import on_large_pages
from storm_vlm.ops._cpu_tensors import NO_PLANE, Lender, descriptor_of, from_tiles, to_tiles
from storm_vlm.ops._cpu_threads import Share, run_shares, shares_of

SCAN_FORWARD = Kernel("_cpu_kernels", "scan_forward")
SCAN_BACKWARD = Kernel("_cpu_kernels", "scan_backward")
# State updates that are worth a thread of their own: about 0.1 ms (ours).
_UPDATES_PER_THREAD = 2**19


class Parameters:
    """What does not change along a sequence, as tables: one serves all pieces of it.

    Args:
        A: State matrix, ``(d, n)``.
        D: Skip weights, ``(d,)``; none if None.
        delta_bias: ``(d,)``; none if None.
        delta_weight: Weight of time steps that are given as a product, ``(d, r)``; none if None.
        groups: Number of groups of channels that share B and C.
    """

    def __init__(
        self,
        A: torch.Tensor,
        D: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        delta_weight: torch.Tensor | None = None,
        *,
        groups: int = 1,
    ) -> None:
        self.d, self.n = A.shape
        self.groups = groups
        self.states = -(-self.n // STATES) * STATES
        self.rank = 0 if delta_weight is None else delta_weight.shape[1]
        in_base_2 = A.to(torch.float32) * math.log2(math.e)
        padded = functional.pad(in_base_2, (0, self.states - self.n))
        none = torch.zeros(self.d)
        self.tables = {
            "A": to_tiles(padded[None], groups),
            "D": to_tiles((none if D is None else D)[None, :, None], groups),
            "delta_bias": to_tiles((none if delta_bias is None else delta_bias)[None, :, None], groups),
        }
        if delta_weight is not None:
            self.tables["delta_weight"] = to_tiles(delta_weight[None], groups)


class Job:
    """The inputs of one scan, brought into the layout of the kernels.

    The time steps are given as ``delta``, ``(b, d, l)``, or as ``low_rank``, ``(b, l, r)``: the kernels then multiply by
    the parameters' ``delta_weight``, tile by tile.
    """

    def __init__(
        self,
        parameters: Parameters,
        u: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        z: torch.Tensor | None,
        *,
        delta: torch.Tensor | None = None,
        low_rank: torch.Tensor | None = None,
        delta_softplus: bool,
        reverse: bool,
    ) -> None:
        self.b, self.d, self.length = u.shape
        self.n, self.states, self.groups = parameters.n, parameters.states, parameters.groups
        self.group_tiles = -(-self.d // (self.groups * LANES))
        self.group_slabs = -(-self.group_tiles // SLAB_TILES)
        self.chunks = -(-self.length // CHUNK_STEPS)
        self._lender = Lender()
        planes = {"u": u, "delta": delta, "z": z}
        self._planes = {name: self._lender.plane(tensor) for name, tensor in planes.items()}
        tables = parameters.tables | {"low_rank": None if low_rank is None else self._by_chunk(low_rank)}
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
            "batches": self.b,
            "rank": parameters.rank,
            **{name: self._lender.address(table) for name, table in tables.items()},
        }

    def run(
        self,
        kernel: Kernel,
        *,
        planes: Mapping[str, torch.Tensor | None],
        tables: Mapping[str, torch.Tensor | None],
    ) -> None:
        """Runs a kernel over all tiles on as many threads as torch uses, this one among them."""
        all_planes = self._planes | {name: self._lender.plane(tensor) for name, tensor in planes.items()}
        fields: dict[str, Any] = self._fields | {
            name: self._lender.address(table) for name, table in tables.items()
        }
        fields["has_ungated"] = int(planes.get("ungated") is not None)
        fields["has_total"] = int(planes.get("total") is not None)
        in_order = [all_planes.get(name, NO_PLANE) for name in PLANES]
        descriptor = descriptor_of([*in_order, *(fields.get(name, 0) for name in Problem._fields)])
        run_shares(kernel, descriptor, self._shares(), scratch_bytes(self.states))

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
        gradient = self.steps_gradient(sums).transpose(2, 3)  # (b, g, l, n) -> (b, g, n, l)
        if weights.ndim == 3 or weights.shape[1] != self.groups:
            gradient = gradient.sum(dim=1, keepdim=True)
        return gradient.reshape(weights.shape) if weights.ndim == 4 else gradient.squeeze(1)

    def steps_gradient(self, sums: torch.Tensor) -> torch.Tensor:
        """Adds the sums of the slabs, ``(b, g, l, n)``."""
        return sums.sum(dim=0)[..., : self.n]

    def to_tiles(self, states: torch.Tensor) -> torch.Tensor:
        """Brings ``(b, d, n)`` into a table, with zeros where it is padded."""
        return to_tiles(functional.pad(states.to(torch.float32), (0, self.states - self.n)), self.groups)

    def from_tiles(self, table: torch.Tensor) -> torch.Tensor:
        """Brings a table back to ``(b, d, n)``, or ``(b, d, 1)`` where it has one number for each channel."""
        return from_tiles(table, self.d, self.groups)[:, :, : self.n]

    def _weights(self, weights: torch.Tensor) -> Weights:
        if weights.ndim == 2:
            table = self.to_tiles(weights[None])
            return Weights(self._lender.address(table), 0, 0, 0)
        by_step = (weights if weights.ndim == 4 else weights[:, None]).transpose(
            2, 3
        )  # (b, g, n, l) -> (b, g, l, n)
        as_it_is = by_step.dtype == torch.float32 and self.n == self.states and by_step.stride(3) == 1
        if not as_it_is or by_step.stride(2) == 0:
            by_step = functional.pad(by_step.to(torch.float32), (0, self.states - self.n)).contiguous()
        batch, group, step, _ = (4 * stride for stride in by_step.stride())
        return Weights(self._lender.address(by_step), batch, 0 if by_step.shape[1] == 1 else group, step)

    def _by_chunk(self, low_rank: torch.Tensor) -> torch.Tensor:
        """Brings the low-rank time steps chunk by chunk, ``(b, chunk, r, step)``, with zeros where they are padded."""
        whole = functional.pad(low_rank.to(torch.float32), (0, 0, 0, -self.length % CHUNK_STEPS))
        return whole.unflatten(1, (-1, CHUNK_STEPS)).transpose(2, 3).contiguous()

    def _shares(self) -> list[Share]:
        """Returns each thread's work: sample, first tile and end tile of neighbouring slabs."""
        slabs = self.groups * self.group_slabs
        updates = self.b * slabs * SLAB_TILES * LANES * self.states * self.length
        return [
            [(sample, self._first_tile(first), self._first_tile(end)) for sample, first, end in share]
            for share in shares_of(self.b, slabs, worth=updates // _UPDATES_PER_THREAD)
        ]

    def _first_tile(self, slab: int) -> int:
        group, place = divmod(slab, self.group_slabs)
        return group * self.group_tiles + place * SLAB_TILES


def groups_of(B: torch.Tensor, C: torch.Tensor) -> int:
    """Returns the number of groups of channels that share B and C."""
    return max(weights.shape[1] if weights.ndim == 4 else 1 for weights in (B, C))
