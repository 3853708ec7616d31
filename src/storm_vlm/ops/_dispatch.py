"""Chooses the backend of a selective scan: by device and availability, or as forced by argument or environment."""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from storm_vlm.errors import StormError
from storm_vlm.ops import _mamba_ssm, _reference, _torch
from storm_vlm.ops._arguments import ScanArguments

logger = logging.getLogger(__name__)

BACKEND_VARIABLE = "STORM_SCAN_BACKEND"


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """A backend and why it was chosen.

    Attributes:
        name: Key of the backend.
        reason: One line for people.
    """

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Backend:
    """One way to compute the scan; the first of the table that serves a device, unless only forced, is its default."""

    scan: Callable[[ScanArguments], tuple[torch.Tensor, torch.Tensor]]
    devices: str
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    requires: str | None = None
    is_definition: bool = False
    is_forced_only: bool = False

    @property
    def missing(self) -> str | None:
        """What the backend needs and this machine has not, if anything; its package is not imported."""
        if self.requires is not None and importlib.util.find_spec(self.requires) is None:
            return f"needs the package {self.requires}"
        if self.devices == "cuda" and not torch.cuda.is_available():
            return "needs a CUDA device, and there is none here"
        return None

    def runs_on(self, device: torch.device) -> bool:
        """Whether the backend is made for this type of device."""
        return self.devices in ("any", device.type)

    def serves(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the backend runs here, on this device and with inputs of this dtype."""
        return self.missing is None and self.runs_on(device) and dtype in self.dtypes


def _scan_on_cpu(arguments: ScanArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Imports the compiled backend when it is first needed."""
    from storm_vlm.ops import _cpu

    return _cpu.scan(arguments)


def _scan_in_triton(arguments: ScanArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Imports the kernels for GPUs when they are first needed."""
    from storm_vlm.ops import _triton

    return _triton.scan(arguments)


_HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)

# Fastest first.
_BACKENDS = {
    "triton": _Backend(_scan_in_triton, devices="cuda", dtypes=_HALF_AND_SINGLE, requires="triton"),
    "mamba_ssm": _Backend(
        _mamba_ssm.scan, devices="cuda", dtypes=_HALF_AND_SINGLE, requires="mamba_ssm", is_forced_only=True
    ),
    "cpu": _Backend(_scan_on_cpu, devices="cpu", dtypes=_HALF_AND_SINGLE, requires="numba"),
    "torch": _Backend(_torch.scan, devices="any"),
    "reference": _Backend(_reference.scan, devices="any", is_definition=True),
}


def available_backends(
    dtype: torch.dtype | None = None, *, device: torch.device | str | None = None
) -> tuple[str, ...]:
    """Returns the names of the backends that run on this machine, fastest first.

    Args:
        dtype: Only those that serve inputs of this dtype; of any if None.
        device: Only those that run on this type of device; on any that is here if None.

    Returns:
        Keys of the backends.
    """
    return tuple(
        name
        for name, entry in _BACKENDS.items()
        if entry.missing is None
        and (dtype is None or dtype in entry.dtypes)
        and (device is None or entry.runs_on(torch.device(device)))
    )


def backend_choice(
    device: torch.device | str, backend: str | None = None, *, dtype: torch.dtype = torch.float32
) -> BackendChoice:
    """Returns the backend that runs on a device.

    Args:
        device: Device of the inputs.
        backend: A backend to force; the variable ``STORM_SCAN_BACKEND`` or the fastest one if None.
        dtype: Dtype of the input ``u``.

    Returns:
        The backend's name and the reason.

    Raises:
        StormError: The backend forced is unknown, lacks its package or device, or does not run on this device or with
            this dtype.
    """
    device = torch.device(device)
    forced_by = "argument backend"
    if backend is None and (backend := os.environ.get(BACKEND_VARIABLE) or None):
        forced_by = BACKEND_VARIABLE
    if backend is None:
        return _fastest(device, dtype)
    entry = _BACKENDS.get(backend)
    if entry is None:
        available = ", ".join(available_backends())
        raise StormError(f"{forced_by}={backend!r}: no such scan backend; there are {available}")
    if entry.missing:
        raise StormError(f"{forced_by}={backend!r} {entry.missing}")
    if not entry.serves(device, dtype):
        raise StormError(f"{forced_by}={backend!r} does not run on {device.type} with {_short(dtype)}")
    return BackendChoice(backend, f"forced by {forced_by}")


def _fastest(device: torch.device, dtype: torch.dtype) -> BackendChoice:
    """Returns the first backend of the table that serves, and says which faster one does not and why."""
    reasons = [f"fastest backend here for {device.type} {_short(dtype)}"]
    candidates = {name: entry for name, entry in _BACKENDS.items() if not entry.is_forced_only}
    for name, entry in candidates.items():
        if entry.serves(device, dtype):
            return BackendChoice(name, "; ".join(reasons))
        if entry.runs_on(device):
            serves = f"serves {', '.join(_short(x) for x in entry.dtypes)}"
            reasons.append(f"{name} {entry.missing or serves}")
    raise ValueError(f"no scan backend serves {device.type} with {dtype}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: torch.Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Runs the selective state-space recurrence along the sequence.

    Computes ``h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]`` and ``y[t] = C[t] h[t] + D u[t]``, and gates the
    output with ``silu(z)``. Inputs may be strided. The recurrence runs in float32, in float64 for float64 inputs.

    Args:
        u: Input, ``(b, d, l)``; float64, float32, float16 or bfloat16; no dimension may be empty.
        delta: Time steps, ``(b, d, l)``.
        A: State matrix, real, ``(d, n)``; negative for a stable recurrence.
        B: Input weights: ``(b, n, l)``, ``(b, g, n, l)`` for ``g`` groups of channels, or ``(d, n)``, constant in time.
        C: Output weights, as ``B``.
        D: Skip weights, ``(d,)``; none if None.
        z: Gate, ``(b, d, l)``; none if None.
        delta_bias: Added to ``delta``, ``(d,)``; none if None.
        delta_softplus: Apply softplus to ``delta`` and its bias.
        return_last_state: Return the last state too.
        initial_state: State before the first step, ``(b, d, n)``; zeros if None.
        reverse: Run from the last position to the first: ``initial_state`` then comes before position ``l - 1`` and
            the last state is that after position 0.
        backend: Force a backend; by device and availability if None.

    Returns:
        Output, ``(b, d, l)``, in the dtype of ``u``; with ``return_last_state`` also the state after the last step,
        ``(b, d, n)``, float32 or float64. Inputs that do not fit, and a backend that cannot run, are a ValueError.

    Source:
        Gu and Dao 2023 (arXiv 2312.00752), Algorithm 2; signature of ``mamba_ssm``'s ``selective_scan_fn``, whose
        arguments mean the same here; ``initial_state`` and ``reverse`` are ours.
    """
    arguments = ScanArguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reverse)
    choice = backend_choice(u.device, backend, dtype=u.dtype)
    _log_once(choice)
    out, last_state = _BACKENDS[choice.name].scan(arguments)
    return (out, last_state) if return_last_state else out


@functools.cache
def _log_once(choice: BackendChoice) -> None:
    """Logs each choice once, as a warning where it is the slow definition."""
    level = logging.WARNING if _BACKENDS[choice.name].is_definition else logging.INFO
    logger.log(level, "selective scan: %s (%s)", choice.name, choice.reason)
