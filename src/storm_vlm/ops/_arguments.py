"""The inputs of a selective scan, checked once for all backends."""

from dataclasses import dataclass

import torch

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class ScanArguments:
    """Checked inputs of `selective_scan`, with the meaning that they have there."""

    u: torch.Tensor
    delta: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    delta_bias: torch.Tensor | None
    delta_softplus: bool
    initial_state: torch.Tensor | None
    reverse: bool

    def __post_init__(self) -> None:
        _check_floating(self.u, "u")
        if self.u.ndim != 3 or 0 in self.u.shape:
            raise ValueError(f"u must be (b, d, l) with no empty dimension, got shape {tuple(self.u.shape)}")
        b, d, length = self.u.shape
        if self.A.ndim != 2 or self.A.shape[0] != d or self.A.shape[1] < 1:
            raise ValueError(f"A must be (d, n) with d={d}, got shape {tuple(self.A.shape)}")
        n = self.A.shape[1]
        expected = {
            "delta": (b, d, length),
            "D": (d,),
            "z": (b, d, length),
            "delta_bias": (d,),
            "initial_state": (b, d, n),
        }
        _check_floating(self.A, "A")
        self._check_device(self.A, "A")
        for name, shape in expected.items():
            self._check(name, shape)
        for name in ("B", "C"):
            self._check_weights(name, getattr(self, name), n)

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, float32 for all others."""
        return torch.float64 if self.u.dtype == torch.float64 else torch.float32

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        tensor = getattr(self, name)
        if tensor is None:
            return
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        _check_floating(tensor, name)
        self._check_device(tensor, name)

    def _check_weights(self, name: str, weights: torch.Tensor, n: int) -> None:
        b, d, length = self.u.shape
        _check_floating(weights, name)
        self._check_device(weights, name)
        shape = tuple(weights.shape)
        fits = shape in ((d, n), (b, n, length))
        if len(shape) == 4:
            fits = shape[0] == b and shape[2:] == (n, length) and shape[1] >= 1 and d % shape[1] == 0
        if not fits:
            raise ValueError(
                f"{name} must be (d, n) = {(d, n)}, (b, n, l) = {(b, n, length)} or (b, g, n, l) with g dividing d, "
                f"got {shape}"
            )

    def _check_device(self, tensor: torch.Tensor, name: str) -> None:
        if tensor.device != self.u.device:
            raise ValueError(f"{name} is on {tensor.device}, u is on {self.u.device}")


def _check_floating(tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype not in _FLOATING:
        raise ValueError(f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
