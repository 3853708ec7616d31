"""The selective scan on a CPU: compiled kernels, one thread for each share of the channels, gradients by hand.

Training keeps the inputs and the state before each chunk of 32 steps; the backward pass recomputes the others, so that
memory is O(b l d). Kernels run without the GIL on threads of this process alone: a forked child makes its own. Outputs
keep the memory order of ``delta`` (a mixer's projections have the channels adjacent), gradients that of their input.

Shapes: ``b`` batch, ``l`` sequence, ``d`` channels, ``n`` state size, ``g`` groups of channels that share B or C.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from storm_vlm.ops._arguments import ScanArguments
from storm_vlm.ops._cpu_job import SCAN_BACKWARD, SCAN_FORWARD, Job, Parameters, groups_of
from storm_vlm.ops._cpu_memory import on_large_pages
from storm_vlm.ops._cpu_tensors import readable


# Compiled already: torch.compile would trace through addresses that it does not know.
@torch.compiler.disable
def scan(arguments: ScanArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the recurrence in compiled code, with a backward pass of its own.

    Args:
        arguments: Checked inputs, on a CPU, none of them float64.

    Returns:
        Output ``(b, d, l)`` in the dtype of ``u``, and the last state ``(b, d, n)`` in float32.
    """
    B, C = _same_groups(arguments.B, arguments.C)
    inputs = (arguments.u, arguments.delta, arguments.A, B, C, arguments.D, arguments.z, arguments.delta_bias)
    tensors = [*inputs, arguments.initial_state]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _SelectiveScan.apply(*tensors, arguments.delta_softplus, arguments.reverse, keep)


class _SelectiveScan(torch.autograd.Function):
    """The scan and its hand-derived gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        u: torch.Tensor,
        delta: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None,
        z: torch.Tensor | None,
        delta_bias: torch.Tensor | None,
        initial_state: torch.Tensor | None,
        delta_softplus: bool,
        reverse: bool,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the output and the last state, and keeps the state before each chunk if asked."""
        tensors = (u, delta, A, B, C, D, z, delta_bias)
        job = _job(tensors, delta_softplus=delta_softplus, reverse=reverse)
        out = on_large_pages(torch.empty_like(delta, dtype=u.dtype))
        state = job.zeros_of_states() if initial_state is None else job.to_tiles(initial_state)
        checkpoints = job.empty_checkpoints() if keep else None
        job.run(SCAN_FORWARD, planes={"out": out}, tables={"state": state, "checkpoints": checkpoints})
        if keep:
            ctx.save_for_backward(*tensors, checkpoints)
            ctx.delta_softplus, ctx.reverse = delta_softplus, reverse
            ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return out, job.from_tiles(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, grad_last_state: torch.Tensor) -> tuple[Any, ...]:
        """Computes the gradient of every input, chunk by chunk, against the order of the scan."""
        *tensors, checkpoints = ctx.saved_tensors
        u, delta, _, B, C, _, z, _ = tensors
        job = _job(ctx.saved_tensors[:-1], delta_softplus=ctx.delta_softplus, reverse=ctx.reverse)
        planes = {"grad_u": u, "grad_delta": delta, "grad_z": z}
        planes = {
            name: None if x is None else on_large_pages(torch.empty_like(readable(x)))
            for name, x in planes.items()
        }
        tables = {
            "state": job.to_tiles(grad_last_state),
            "grad_A": job.zeros_of_states(),
            "grad_D": job.zeros_of_channels(),
            "grad_delta_bias": job.zeros_of_channels(),
            "grad_B": job.zeros_of_weights(B),
            "grad_C": job.zeros_of_weights(C),
        }
        job.run(
            SCAN_BACKWARD,
            planes={"grad_out": readable(grad_out), **planes},
            tables={"checkpoints": checkpoints, **tables},
        )
        gradients = (
            planes["grad_u"],
            planes["grad_delta"],
            job.from_tiles(tables["grad_A"]).sum(dim=0),
            job.weights_gradient(tables["grad_B"], B),
            job.weights_gradient(tables["grad_C"], C),
            job.from_tiles(tables["grad_D"]).sum(dim=(0, 2)),
            planes["grad_z"],
            job.from_tiles(tables["grad_delta_bias"]).sum(dim=(0, 2)),
        )
        in_dtype = [
            None if x is None else gradient.to(x.dtype)
            for x, gradient in zip(tensors, gradients, strict=True)
        ]
        initial = None
        if ctx.initial_dtype is not None:
            initial = job.from_tiles(tables["state"]).to(ctx.initial_dtype)
        return (*in_dtype, initial, None, None, None)


def _job(tensors: Sequence[Any], *, delta_softplus: bool, reverse: bool) -> Job:
    """Returns the scan of inputs that stand in the order of the public function."""
    u, delta, A, B, C, D, z, delta_bias = tensors
    parameters = Parameters(A, D, delta_bias, groups=groups_of(B, C))
    return Job(parameters, u, B, C, z, delta=delta, delta_softplus=delta_softplus, reverse=reverse)


def _same_groups(B: torch.Tensor, C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeats groups where B and C have different numbers of them."""
    counts = [weights.shape[1] if weights.ndim == 4 else 1 for weights in (B, C)]
    if 1 in counts or counts[0] == counts[1]:
        return B, C
    common = math.lcm(*counts)
    return B.repeat_interleave(common // counts[0], dim=1), C.repeat_interleave(common // counts[1], dim=1)
