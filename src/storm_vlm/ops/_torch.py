"""The selective scan in plain PyTorch, on any device: segments in turn, the chunks of a segment side by side.

A segment is cut into chunks of `CHUNK_STEPS` steps. All chunks step together from a zero state; then each chunk's
true first state follows from the last states before it, and all chunks step together once more. Training keeps the
state at the beginning of each segment only, and the backward pass recomputes the others: memory is O(b l d).

Shapes: ``b`` batch, ``l`` sequence, ``d`` channels, ``n`` state size.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from storm_vlm.ops._arguments import ScanArguments
from storm_vlm.ops._torch_segment import Gradients, Problem, Segment


def scan(arguments: ScanArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the recurrence chunk by chunk, with a backward pass of its own.

    Args:
        arguments: Checked inputs.

    Returns:
        Output ``(b, d, l)`` in the dtype of ``u``, and the last state ``(b, d, n)`` in the dtype computed in.
    """
    tensors = (
        arguments.u, arguments.delta, arguments.A, arguments.B, arguments.C, arguments.D, arguments.z,
        arguments.delta_bias, arguments.initial_state,
    )  # fmt: skip
    # Inside an autograd Function gradients are off, so whether a backward pass can follow is asked here.
    keep_states = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _SelectiveScan.apply(*tensors, arguments.delta_softplus, arguments.reverse, keep_states)


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
        keep_states: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the output and the last state, and for training keeps the first state of each segment."""
        problem = Problem.of(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
        with torch.autocast(u.device.type, enabled=False):
            state = problem.first_state(initial_state)
            out = torch.empty_like(u, memory_format=torch.contiguous_format)
            spans = problem.segments()
            first_states = state.new_empty(len(spans) if keep_states else 0, *state.shape)
            for i, (start, end) in enumerate(spans):
                if keep_states:
                    first_states[i] = state
                segment = Segment.load(problem, start, end)
                y, state = segment.outputs(state)
                out[..., start:end] = segment.gate(y)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, first_states)
        ctx.delta_softplus, ctx.reverse = delta_softplus, reverse
        ctx.has_initial_state = initial_state is not None
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return out, state.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, grad_last_state: torch.Tensor) -> tuple[Any, ...]:
        """Computes the gradient of every input, segment by segment, against the order of the scan."""
        *tensors, first_states = ctx.saved_tensors
        u, delta, A, B, C, D, z, delta_bias = tensors
        problem = Problem.of(u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus, ctx.reverse)
        gradients = Gradients.zeros(problem)
        with torch.autocast(grad_out.device.type, enabled=False):
            adjoint = grad_last_state.to(problem.dtype).unflatten(1, problem.channels)
            checkpoints = list(zip(problem.segments(), first_states, strict=True))
            for (start, end), first_state in reversed(checkpoints):
                segment = Segment.load(problem, start, end)
                adjoint = segment.add_gradients(gradients, grad_out[..., start:end], first_state, adjoint)
        grad_initial = adjoint.flatten(1, 2).to(ctx.initial_dtype) if ctx.has_initial_state else None
        return (*gradients.in_dtypes_of(tensors), grad_initial, None, None, None)
