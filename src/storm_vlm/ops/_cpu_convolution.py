"""The depthwise causal convolution and SiLU before a scan, compiled for CPUs, with a gradient by hand.

Rows of channels are read one after the other as they lie in memory, each once from there: those before it are still in the
cache. The gradient keeps the last rows of what flows into the taps. Sums have one order, whatever the number of threads.

Shapes: ``b`` batch, ``l`` sequence, ``d`` channels, ``k`` taps of the convolution.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional

from storm_vlm.ops._cpu_compile import Kernel
from storm_vlm.ops._cpu_elements import FLOAT32, read_block, read_one, write_block, write_one
from storm_vlm.ops._cpu_layout import Plane, plane_of
from storm_vlm.ops._cpu_tensors import NO_PLANE, Lender, descriptor_of
from storm_vlm.ops._cpu_threads import run_shares, shares_of
from storm_vlm.ops._cpu_vector import (
    BLOCK_BYTES,
    LANES,
    ROW_BYTES,
    STATES,
    fma,
    inline,
    integers,
    load64,
    prefetch,
    sigmoid,
    store,
    zeros64,
)

# Elements that are worth a thread of their own: about 0.1 ms (ours).
_ELEMENTS_PER_THREAD = 2**16
_NUM_PLANES = 5
ROWS_AHEAD = 16
CHANNELS = STATES * LANES  # of a block
_PLANE_FIELDS = len(Plane._fields)


class Convolution(NamedTuple):
    """What the kernels work on; channels are adjacent in all planes."""

    x: Plane
    history: Plane  # k - 1 rows that come before the first step of the scan
    grad_u: Plane
    written: Plane  # the output, or the gradient of x
    grad_history: Plane
    length: int
    channels: int
    blocks: int  # of 64 channels
    taps: int
    lead: int  # rows before a step that its taps reach: k - 1 in scan order, 0 against it
    # Tables with the channels padded to whole blocks.
    weight: int  # (k, d), in the order of the rows
    bias: int  # (d,)
    grad_weight: int  # (b, k, d)
    grad_bias: int  # (b, d)


_NUM_DESCRIBED = _NUM_PLANES * _PLANE_FIELDS + len(Convolution._fields) - _NUM_PLANES


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
    _run(convolution_forward, x, weight, bias, history, reverse=reverse, planes={"written": out}, sums={})


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
    _run(convolution_backward, x, weight, bias, history, reverse=reverse, planes=planes, sums=sums)
    by_row = sums["grad_weight"].sum(dim=0)[:, :d].T  # (k, d) -> (d, k)
    by_step = by_row.flip(-1) if reverse else by_row
    return ConvolutionGradients(by_step, sums["grad_bias"].sum(dim=0)[:d], grad_history.transpose(1, 2))


def _run(
    kernel: Any,
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
    }
    addresses = {name: lender.address(table) for name, table in tables.items()}
    known = lent | numbers | addresses
    fields = [
        known.get(name, 0 if i >= _NUM_PLANES else NO_PLANE) for i, name in enumerate(Convolution._fields)
    ]
    shares = shares_of(b, numbers["blocks"], worth=b * length * d // _ELEMENTS_PER_THREAD)
    # The last rows of the taps' gradient, and one block to gather those in that the channels do not fill.
    scratch_bytes = (taps * numbers["blocks"] + 1) * BLOCK_BYTES + ROW_BYTES
    run_shares(kernel, descriptor_of(fields), shares, scratch_bytes)


def _rows(lender: Lender, tensor: torch.Tensor) -> Plane:
    """Lends a ``(b, l, d)`` tensor with its channels adjacent; an empty one is no plane."""
    if tensor.numel() == 0:
        return NO_PLANE
    return lender.plane((tensor if tensor.stride(2) == 1 else tensor.contiguous()).transpose(1, 2))


def _padded(values: torch.Tensor) -> torch.Tensor:
    """Pads the channels to whole blocks."""
    return functional.pad(values.to(torch.float32), (0, -values.shape[-1] % CHANNELS)).contiguous()


@Kernel
def convolution_forward(descriptor: int, scratch: int, batch: int, first: int, end: int) -> None:
    """Convolves a range of blocks."""
    c = _convolution_of(descriptor)
    for step in range(c.length):
        for block in range(first, end):
            _prefetch(c.x, batch, step, block)
            total = _taps_of(c, batch, step, block, scratch)
            _write(c, c.written, batch, step, block, total * sigmoid(total), scratch)


@Kernel
def convolution_backward(descriptor: int, scratch: int, batch: int, first: int, end: int) -> None:
    """Computes the gradients of a range of blocks: of the taps' sum at a step, then of the input no later one needs."""
    c = _convolution_of(descriptor)
    recent = scratch + BLOCK_BYTES
    row_bytes = (end - first) * BLOCK_BYTES
    for step in range(c.length + c.taps - 1):
        if step < c.length:
            row = recent + step % c.taps * row_bytes
            for block in range(first, end):
                grad = _taps_gradient(c, batch, step, block, scratch)
                store(row + (block - first) * BLOCK_BYTES, grad)
        done = step - c.lead
        for block in range(first, end):
            total = zeros64()
            for m in range(c.taps):
                later = step - m
                if 0 <= later < c.length:
                    place = recent + later % c.taps * row_bytes + (block - first) * BLOCK_BYTES
                    total = fma(_weight(c, m, block), load64(place), total)
            if done < 0:
                _write(c, c.grad_history, batch, done + c.lead, block, total, scratch)
            elif done >= c.length:
                _write(c, c.grad_history, batch, done - c.length, block, total, scratch)
            else:
                _write(c, c.written, batch, done, block, total, scratch)


@inline
def _taps_gradient(c: Convolution, batch: int, step: int, block: int, scratch: int) -> Any:
    """Returns the gradient of the taps' sum at a step, and adds it to those of weight and bias."""
    _prefetch(c.x, batch, step, block)
    total = _taps_of(c, batch, step, block, scratch)
    s = sigmoid(total)
    grad = _read(c, c.grad_u, batch, step, block, scratch) * s * fma(total, 1.0 - s, 1.0)
    bias = c.grad_bias + (batch * c.blocks + block) * BLOCK_BYTES
    store(bias, load64(bias) + grad)
    for m in range(c.taps):
        place = c.grad_weight + ((batch * c.taps + m) * c.blocks + block) * BLOCK_BYTES
        store(place, fma(grad, _input(c, batch, step + m - c.lead, block, scratch), load64(place)))
    return grad


@inline
def _taps_of(c: Convolution, batch: int, step: int, block: int, scratch: int) -> Any:
    """Returns the weighted sum of the inputs around a step, with the bias."""
    total = load64(c.bias + block * BLOCK_BYTES)
    for m in range(c.taps):
        x = _input(c, batch, step + m - c.lead, block, scratch)
        total = fma(x, _weight(c, m, block), total)
    return total


@inline
def _prefetch(plane: Plane, batch: int, step: int, block: int) -> None:
    """Asks for a block some rows ahead: each row is on another page, where the hardware does not foresee it."""
    place = (
        plane.address
        + batch * plane.batch
        + (step + ROWS_AHEAD) * plane.step
        + block * CHANNELS * plane.channel
    )
    for i in range(0, CHANNELS * plane.channel, ROW_BYTES):
        prefetch(place + i)


@inline
def _weight(c: Convolution, tap: int, block: int) -> Any:
    return load64(c.weight + (tap * c.blocks + block) * BLOCK_BYTES)


@inline
def _input(c: Convolution, batch: int, step: int, block: int, scratch: int) -> Any:
    """Returns the input at a step, or the one that the history has for it."""
    if step < 0:
        return _read(c, c.history, batch, step + c.taps - 1, block, scratch)
    if step >= c.length:
        return _read(c, c.history, batch, step - c.length, block, scratch)
    return _read(c, c.x, batch, step, block, scratch)


@inline
def _read(c: Convolution, plane: Plane, batch: int, step: int, block: int, scratch: int) -> Any:
    place = plane.address + batch * plane.batch + step * plane.step + block * CHANNELS * plane.channel
    if (block + 1) * CHANNELS <= c.channels:
        return read_block(place, plane.dtype)
    store(scratch, zeros64())
    for i in range(c.channels - block * CHANNELS):
        write_one(scratch + 4 * i, FLOAT32, read_one(place + i * plane.channel, plane.dtype))
    return load64(scratch)


@inline
def _write(
    c: Convolution, plane: Plane, batch: int, step: int, block: int, values: Any, scratch: int
) -> None:
    place = plane.address + batch * plane.batch + step * plane.step + block * CHANNELS * plane.channel
    if (block + 1) * CHANNELS <= c.channels:
        write_block(place, plane.dtype, values)
        return
    store(scratch, values)
    for i in range(c.channels - block * CHANNELS):
        write_one(place + i * plane.channel, plane.dtype, read_one(scratch + 4 * i, FLOAT32))


@inline
def _convolution_of(descriptor: int) -> Convolution:
    """Reads the descriptor."""
    d = integers(descriptor, _NUM_DESCRIBED)
    i = _NUM_PLANES * _PLANE_FIELDS
    return Convolution(
        plane_of(d, 0), plane_of(d, 1), plane_of(d, 2), plane_of(d, 3), plane_of(d, 4),
        d[i], d[i + 1], d[i + 2], d[i + 3], d[i + 4], d[i + 5], d[i + 6], d[i + 7], d[i + 8],
    )  # fmt: skip
