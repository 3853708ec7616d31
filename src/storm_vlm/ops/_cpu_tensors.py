"""Brings tensors into the layout of the CPU kernels: planes where they lie, and tables of tiles.

Shapes: ``b`` batch, ``l`` sequence, ``d`` channels in ``g`` groups. A table is ``(b, tile, k, 16)``: k numbers for each
channel, each group's channels padded with zeros to whole tiles of 16.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch.nn import functional

from storm_vlm.ops._cpu_layout import BFLOAT16, FLOAT16, FLOAT32, LANES, Plane

NO_PLANE = Plane(0, 0, 0, 0, 0)
_CODES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


class Lender:
    """Lends tensors to kernels by address, and owns what the addresses point to."""

    def __init__(self) -> None:
        self._owned: list[torch.Tensor] = []

    def address(self, tensor: torch.Tensor | None) -> int:
        """Returns the address of a tensor's memory, 0 for None."""
        if tensor is None:
            return 0
        self._owned.append(tensor)
        return tensor.data_ptr()

    def plane(self, tensor: torch.Tensor | None) -> Plane:
        """Returns where a ``(b, d, l)`` tensor lies; a copy is made where kernels could not read it."""
        if tensor is None:
            return NO_PLANE
        tensor = readable(tensor)
        strides = [stride * tensor.element_size() for stride in tensor.stride()]
        return Plane(self.address(tensor), _CODES[tensor.dtype], *strides)


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a ``(b, d, l)`` tensor itself, or a copy where no dimension is contiguous or no kernel reads the dtype."""
    if tensor.dtype not in _CODES:
        tensor = tensor.to(torch.float32)
    return tensor if 1 in tensor.stride()[1:] else tensor.contiguous()


def descriptor_of(values: Iterable[int | tuple]) -> np.ndarray:
    """Returns planes, weights and numbers as the one array of integers that a kernel takes."""
    flat = [number for value in values for number in (value if isinstance(value, tuple) else (value,))]
    return np.array(flat, dtype=np.int64)


def to_tiles(values: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """Brings ``(b, d, k)`` into a table, with zeros where it is padded."""
    grouped = values.to(torch.float32).unflatten(1, (groups, -1))  # (b, g, e, k)
    padded = functional.pad(grouped, (0, 0, 0, -grouped.shape[2] % LANES))
    return padded.unflatten(2, (-1, LANES)).transpose(3, 4).flatten(1, 2).contiguous()


def from_tiles(table: torch.Tensor, channels: int, groups: int = 1) -> torch.Tensor:
    """Brings a table back to ``(b, d, k)``."""
    by_group = table.unflatten(1, (groups, -1)).transpose(3, 4).flatten(2, 3)  # (b, g, e, k)
    return by_group[:, :, : channels // groups].flatten(1, 2)
