"""The inputs of the inner part of a Mamba mixer, checked once for all backends."""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class InnerWeights(NamedTuple):
    """The parameters of one scan direction, with the meaning that they have in `mamba_inner`."""

    conv_weight: torch.Tensor
    conv_bias: torch.Tensor
    x_proj_weight: torch.Tensor
    dt_proj_weight: torch.Tensor
    dt_bias: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor

    @property
    def rank(self) -> int:
        """Rank of the time-step projection."""
        return self.dt_proj_weight.shape[1]

    @property
    def sizes(self) -> list[int]:
        """Widths of the three parts of the input-dependent projection: time steps, B and C."""
        return [self.rank, self.A.shape[1], self.A.shape[1]]


@dataclass(frozen=True, slots=True)
class InnerArguments:
    """Checked inputs of `mamba_inner`, with the meaning that they have there."""

    x: torch.Tensor
    weights: InnerWeights
    z: torch.Tensor | None
    earlier: torch.Tensor | None
    conv_state: torch.Tensor | None
    ssm_state: torch.Tensor | None
    reverse: bool

    def __post_init__(self) -> None:
        if self.x.ndim != 3 or 0 in self.x.shape:
            raise ValueError(f"x must be (b, l, d) with no empty dimension, got shape {tuple(self.x.shape)}")
        b, length, d = self.x.shape
        w = self.weights
        if w.conv_weight.ndim != 2 or w.A.ndim != 2 or w.dt_proj_weight.ndim != 2:
            raise ValueError("conv_weight must be (d, k), A (d, n) and dt_proj_weight (d, r)")
        taps, n = w.conv_weight.shape[1], w.A.shape[1]
        expected = {
            "conv_weight": (d, taps),
            "conv_bias": (d,),
            "x_proj_weight": (w.rank + 2 * n, d),
            "dt_proj_weight": (d, w.rank),
            "dt_bias": (d,),
            "A": (d, n),
            "D": (d,),
        }
        for name, shape in expected.items():
            _check(name, getattr(w, name), shape)
        _check("z", self.z, (b, length, d))
        _check("earlier", self.earlier, (b, length, d))
        _check("conv_state", self.conv_state, (b, d, taps - 1))
        _check("ssm_state", self.ssm_state, (b, d, n))


def _check(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
