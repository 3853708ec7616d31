"""The inner part of a Mamba mixer: what one scan direction does between the two outer projections.

Shapes: ``b`` batch, ``l`` sequence, ``d`` inner channels, ``k`` taps of the convolution, ``n`` state size, ``r`` rank of the
time steps.
"""

import torch
from torch.nn import functional

from storm_vlm.ops._dispatch import backend_choice, selective_scan
from storm_vlm.ops._inner_arguments import InnerArguments, InnerWeights


def mamba_inner(
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor,
    x_proj_weight: torch.Tensor,
    dt_proj_weight: torch.Tensor,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None = None,
    *,
    earlier: torch.Tensor | None = None,
    conv_state: torch.Tensor | None = None,
    ssm_state: torch.Tensor | None = None,
    reverse: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Convolves, projects and scans a sequence in one direction.

    Computes ``u = silu(conv(x) + conv_bias)``, the time steps, B and C from ``u``, the selective scan of ``u``, and
    ``(scan + earlier) silu(z)``. With the `cpu` backend all of it is compiled, forward and backward; others compose
    it from PyTorch operations and `selective_scan`.

    Args:
        x: Input, ``(b, l, d)``.
        conv_weight: Taps of the depthwise causal convolution, ``(d, k)``; the last one falls on the step itself.
        conv_bias: ``(d,)``.
        x_proj_weight: Weight of the input-dependent projection, ``(r + 2 n, d)``: time steps, B, C.
        dt_proj_weight: Weight that widens the time steps, ``(d, r)``.
        dt_bias: Added to the time steps before softplus, ``(d,)``.
        A: State matrix, ``(d, n)``.
        D: Skip weights, ``(d,)``.
        z: Gate, ``(b, l, d)``; none if None.
        earlier: Ungated output of another direction over the same sequence, ``(b, l, d)``; it is added before the gate.
        conv_state: The ``k - 1`` inputs that the scan has seen before these, ``(b, d, k - 1)``, in the order of their
            positions; zeros if None.
        ssm_state: State of the recurrence before these inputs, ``(b, d, n)``; zeros if None.
        reverse: Run from the last position to the first; "before" is then what follows position ``l - 1``.
        backend: Force a backend of the scan; by device and availability if None.

    Returns:
        Output, ``(b, l, d)``, and the two states after these inputs; ``conv_state`` in the dtype of ``x``, ``ssm_state``
        in float32 (float64 for float64 inputs). Inputs that do not fit are a ValueError.

    Source:
        Gu and Dao 2023 (arXiv 2312.00752), Figure 3; ``mamba_ssm``'s ``mamba_inner_fn`` without the outer projection.
        One call for each direction, which hand their sum on, is ours.
    """
    weights = InnerWeights(conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D)
    arguments = InnerArguments(x, weights, z, earlier, conv_state, ssm_state, reverse)
    backend = backend_choice(x.device, backend, dtype=x.dtype).name
    if backend == "cpu":
        from storm_vlm.ops import _cpu_inner

        out, ssm_state = _cpu_inner.inner(arguments)
    else:
        out, ssm_state = _composed(arguments, backend)
    return out, _next_conv_state(arguments), ssm_state


def _composed(arguments: InnerArguments, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the inner part from operations that every device has, and returns its output and last state."""
    a, w = arguments, arguments.weights
    u = _convolve(a)  # (b, l, d)
    low_rank, B, C = functional.linear(u, w.x_proj_weight).split(w.sizes, dim=-1)
    y, state = selective_scan(
        u.transpose(1, 2),  # (b, l, d) -> (b, d, l)
        functional.linear(low_rank, w.dt_proj_weight).transpose(1, 2),
        w.A,
        B.transpose(1, 2),
        C.transpose(1, 2),
        D=w.D,
        z=a.z.transpose(1, 2) if a.z is not None and a.earlier is None else None,
        delta_bias=w.dt_bias,
        delta_softplus=True,
        return_last_state=True,
        initial_state=a.ssm_state,
        reverse=a.reverse,
        backend=backend,
    )
    y = y.transpose(1, 2)  # (b, d, l) -> (b, l, d)
    if a.earlier is not None:
        y = y + a.earlier
        y = y if a.z is None else y * functional.silu(a.z)
    return y, state


def _convolve(arguments: InnerArguments) -> torch.Tensor:
    """Depthwise convolution over the current and the ``k - 1`` inputs scanned before, then SiLU."""
    x, weight = arguments.x.transpose(1, 2), arguments.weights.conv_weight  # (b, l, d) -> (b, d, l)
    before = arguments.conv_state
    if before is None:
        before = x.new_zeros(*x.shape[:2], weight.shape[1] - 1)
    padded = torch.cat([x, before] if arguments.reverse else [before, x], dim=-1)
    weight = weight.flip(-1) if arguments.reverse else weight
    u = functional.conv1d(padded, weight[:, None], arguments.weights.conv_bias, groups=x.shape[1])
    return functional.silu(u).transpose(1, 2)


def _next_conv_state(arguments: InnerArguments) -> torch.Tensor:
    """Returns the last ``k - 1`` inputs of the scan."""
    x, tail = (
        arguments.x.transpose(1, 2),
        arguments.weights.conv_weight.shape[1] - 1,
    )  # (b, l, d) -> (b, d, l)
    if x.shape[-1] < tail:
        before = arguments.conv_state
        before = x.new_zeros(*x.shape[:2], tail) if before is None else before.to(x.dtype)
        x = torch.cat([x, before] if arguments.reverse else [before, x], dim=-1)
    return x[..., :tail] if arguments.reverse else x[..., x.shape[-1] - tail :]
