"""The definition of the selective scan: one step after the other, every gradient by autograd.

Shapes: ``b`` batch, ``l`` sequence, ``d`` channels, ``n`` state size, ``g`` groups of channels that share B or C.
"""

import torch
from torch.nn import functional

from storm_vlm.ops._arguments import ScanArguments


def scan(arguments: ScanArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the recurrence step by step, in float64 for float64 inputs and in float32 otherwise.

    Args:
        arguments: Checked inputs.

    Returns:
        Output ``(b, d, l)`` in the dtype of ``u``, and the last state ``(b, d, n)`` in the dtype computed in.

    Source:
        Gu and Dao 2023 (arXiv 2312.00752), Eq. 2a with the discretisation of its section 3.2 as in ``mamba_ssm``.
    """
    dtype = arguments.compute_dtype
    u, A = arguments.u.to(dtype), arguments.A.to(dtype)
    delta = arguments.delta.to(dtype)
    if arguments.delta_bias is not None:
        delta = delta + arguments.delta_bias.to(dtype)[:, None]
    if arguments.delta_softplus:
        delta = functional.softplus(delta)
    B, C = (_of_steps(weights.to(dtype), u.shape) for weights in (arguments.B, arguments.C))

    state = u.new_zeros(*u.shape[:2], A.shape[1])
    if arguments.initial_state is not None:
        state = arguments.initial_state.to(dtype)
    outputs: list[torch.Tensor] = [state] * u.shape[2]
    steps = range(u.shape[2])
    for t in reversed(steps) if arguments.reverse else steps:
        state = torch.exp(delta[..., t, None] * A) * state + (delta[..., t] * u[..., t])[..., None] * B[t]
        outputs[t] = (state * C[t]).sum(dim=-1)
    y = torch.stack(outputs, dim=-1)

    if arguments.D is not None:
        y = y + arguments.D.to(dtype)[:, None] * u
    if arguments.z is not None:
        y = y * functional.silu(arguments.z.to(dtype))
    return y.to(arguments.u.dtype), state


def _of_steps(weights: torch.Tensor, shape: torch.Size) -> list[torch.Tensor]:
    """Returns B or C of each step as one vector for each channel: ``(b, d, n)``, or ``(d, n)`` when constant."""
    _, d, length = shape
    if weights.ndim == 2:
        return [weights] * length
    grouped = weights[:, None] if weights.ndim == 3 else weights  # (b, g, n, l)
    return [step.repeat_interleave(d // step.shape[1], dim=1) for step in grouped.unbind(dim=-1)]
