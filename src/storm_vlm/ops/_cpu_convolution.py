"""The depthwise causal convolution and SiLU before a scan, compiled for CPUs, with a gradient by hand.

Shapes: ``b`` batch, ``l`` sequence, ``d`` channels, ``k`` taps of the convolution.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from storm_vlm.ops._cpu_compile import Kernel
from storm_vlm.ops._cpu_layout import (
    BLOCK_BYTES,
    CHANNELS,
    GROUP_STEPS,
    NUM_CONVOLUTION_PLANES,
    Convolution,
    Plane,
)
from storm_vlm.ops._cpu_tensors import NO_PLANE, Lender, descriptor_of
from storm_vlm.ops._cpu_threads import run_shares, shares_of

_FORWARD = Kernel("_cpu_convolution_kernels", "convolution_forward")
_BACKWARD = Kernel("_cpu_convolution_kernels", "convolution_backward")
# Elements that are worth a thread of their own: about 0.1 ms (ours).
_ELEMENTS_PER_THREAD = 2**16


class ConvolutionGradients(NamedTuple):
    """Gradients of what `convolve` takes besides ``x``, in float32."""

    weight: torch.Tensor  # (d, k)
    bias: torch.Tensor  # (d,)
    history: torch.Tensor  # (b, d, k - 1)


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    history: torch.Tensor | None,
    *,
    reverse: bool,
    out: torch.Tensor,
) -> None:
    """Computes ``silu(conv(x) + bias)``.

    Args:
        x: Input, ``(b, l, d)``; float32, bfloat16 or float16.
        weight: Taps, ``(d, k)``; the last one falls on the step itself.
        bias: ``(d,)``.
        history: The ``k - 1`` inputs that the scan has seen before, ``(b, d, k - 1)``, in the order of their steps;
            zeros if None.
        reverse: The scan runs from the last step to the first.
        out: Where the output goes, ``(b, l, d)``.
    """
    _run(_FORWARD, x, weight, bias, history, reverse=reverse, planes={"written": out}, sums={})


def convolve_gradient(
    grad_u: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    history: torch.Tensor | None,
    *,
    reverse: bool,
    out: torch.Tensor,
) -> ConvolutionGradients:
    """Computes the gradients of `convolve`.

    Args:
        grad_u: Gradient of the output, ``(b, l, d)``.
        x: As in `convolve`.
        weight: As in `convolve`.
        bias: As in `convolve`.
        history: As in `convolve`.
        reverse: As in `convolve`.
        out: Where the gradient of ``x`` goes, ``(b, l, d)``.

    Returns:
        The other gradients.
    """
    b, _, d = x.shape
    taps, blocks = weight.shape[1], -(-d // CHANNELS)
    grad_history = torch.empty(b, taps - 1, d)
    sums = {
        "grad_weight": torch.zeros(b, taps, blocks * CHANNELS),
        "grad_bias": torch.zeros(b, blocks * CHANNELS),
    }
    planes = {"grad_u": grad_u, "written": out, "grad_history": grad_history}
    _run(_BACKWARD, x, weight, bias, history, reverse=reverse, planes=planes, sums=sums)
    by_row = sums["grad_weight"].sum(dim=0)[:, :d].T  # (k, d) -> (d, k)
    by_step = by_row.flip(-1) if reverse else by_row
    return ConvolutionGradients(by_step, sums["grad_bias"].sum(dim=0)[:d], grad_history.transpose(1, 2))


def _run(
    kernel: Kernel,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    history: torch.Tensor | None,
    *,
    reverse: bool,
    planes: dict[str, torch.Tensor],
    sums: dict[str, torch.Tensor],
) -> None:
    """Lends the tensors to a kernel and runs it over all channels."""
    b, length, d = x.shape
    taps = weight.shape[1]
    lender = Lender()
    before = x.new_zeros(b, taps - 1, d) if history is None else history.to(x.dtype).transpose(1, 2)
    by_row = (weight.flip(-1) if reverse else weight).T  # (d, k) -> (k, d)
    tables = {"weight": _padded(by_row), "bias": _padded(bias)} | sums
    lent = {name: _rows(lender, tensor) for name, tensor in ({"x": x, "history": before} | planes).items()}
    numbers = {
        "length": length,
        "channels": d,
        "blocks": -(-d // CHANNELS),
        "taps": taps,
        "lead": 0 if reverse else taps - 1,
        "ring": 1 << (GROUP_STEPS + taps - 2).bit_length(),
    }
    addresses = {name: lender.address(table) for name, table in tables.items()}
    known = lent | numbers | addresses
    fields = [
        known.get(name, 0 if i >= NUM_CONVOLUTION_PLANES else NO_PLANE)
        for i, name in enumerate(Convolution._fields)
    ]
    shares = shares_of(b, numbers["blocks"], worth=b * length * d // _ELEMENTS_PER_THREAD)
    # A ring for each block, and a block to gather those in that the channels do not fill.
    scratch_bytes = (numbers["ring"] * numbers["blocks"] + 1) * BLOCK_BYTES
    run_shares(kernel, descriptor_of(fields), shares, scratch_bytes)


def _rows(lender: Lender, tensor: torch.Tensor) -> Plane:
    """Lends a ``(b, l, d)`` tensor with its channels adjacent; an empty one is no plane."""
    if tensor.numel() == 0:
        return NO_PLANE
    return lender.plane((tensor if tensor.stride(2) == 1 else tensor.contiguous()).transpose(1, 2))


def _padded(values: torch.Tensor) -> torch.Tensor:
    """Pads the channels to whole blocks."""
    return functional.pad(values.to(torch.float32), (0, -values.shape[-1] % CHANNELS)).contiguous()
