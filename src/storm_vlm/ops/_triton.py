"""The selective scan on a GPU: Triton kernels over blocks of channels and chunks of time, gradients by hand.

Where the channels of all samples leave the GPU half empty, time is cut into chunks, in three passes: every chunk from
a zero state; a short sequential pass over the chunks' last states, which gives each its true first state; every chunk
again, with outputs. The backward pass does the same against the order of the scan. With one chunk the first two passes
fall away.

Memory, in float32 tensors of ``(b, d, l)``: training keeps the inputs and the state before each chunk, ``n / steps of a
chunk`` (none of size with one chunk). The backward pass takes its channels in rounds, a quarter or an eighth at a
time if the scan is large; for the channels of a round it holds the states before each tile of 8 steps, ``n / 8``,
and the sums over each block of channels for B and C, ``2 n / 8`` for ``n = 16``. No sum depends on the order in which
programs run: results repeat bit for bit.

Shapes: ``b`` batch, ``l`` sequence, ``d`` channels, ``n`` state size.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from storm_vlm.ops._arguments import ScanArguments
from storm_vlm.ops._triton_launch import Launch


# A compiled function calls the scan as it is: there is nothing to gain by tracing launches.
@torch.compiler.disable
def scan(arguments: ScanArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the recurrence in Triton kernels, with a backward pass of its own.

    Args:
        arguments: Checked inputs, on a GPU, ``u`` not float64.

    Returns:
        Output ``(b, d, l)`` in the dtype of ``u`` and the memory order of ``delta``, and the last state ``(b, d, n)`` in
        float32.
    """
    return _SelectiveScan.apply(
        arguments.u, arguments.delta, arguments.A, arguments.B, arguments.C, arguments.D, arguments.z,
        arguments.delta_bias, arguments.initial_state, arguments.delta_softplus, arguments.reverse,
    )  # fmt: skip


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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the output and the last state, and keeps the state before each chunk."""
        launch = Launch(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
        with launch.on_device():
            starts = launch.chunk_starts(launch.state_table(initial_state))
            out, last_state = launch.outputs(starts)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, starts)
        ctx.delta_softplus, ctx.reverse = delta_softplus, reverse
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        return out, launch.from_table(last_state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, grad_last_state: torch.Tensor) -> tuple[Any, ...]:
        """Computes the gradient of every input, chunk by chunk, against the order of the scan."""
        *tensors, starts = ctx.saved_tensors
        u, delta, A, B, C, D, z, delta_bias = tensors
        launch = Launch(u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus, ctx.reverse)
        with launch.on_device():
            adjoints = launch.chunk_starts(launch.state_table(grad_last_state), grad_out)
            gradients, grad_first = launch.gradients(starts, adjoints, grad_out)
        in_dtype = [
            None if x is None or gradient is None else gradient.to(x.dtype)
            for x, gradient in zip(tensors, gradients, strict=True)
        ]
        initial = None
        if ctx.initial_dtype is not None:
            initial = launch.from_table(grad_first).to(ctx.initial_dtype)
        return (*in_dtype, initial, None, None)
