"""The compiled kernels of the depthwise convolution: a call does some blocks of 64 channels of one sample.

Rows of channels are read one after the other as they lie in memory, each once from there: those before it are still in the
cache. The gradient keeps the last rows of what flows into the taps.
"""

from typing import Any

from storm_vlm.ops._cpu_elements import read_block, read_one, write_block, write_one
from storm_vlm.ops._cpu_layout import (
    BLOCK_BYTES,
    CHANNELS,
    FLOAT32,
    NUM_CONVOLUTION_PLANES,
    PLANE_INTEGERS,
    ROW_BYTES,
    Convolution,
    Plane,
)
from storm_vlm.ops._cpu_places import plane_of
from storm_vlm.ops._cpu_vector import fma, inline, integer, load64, prefetch, sigmoid, store, zeros64

_ROWS_AHEAD = 16


def convolution_forward(descriptor: int, scratch: int, batch: int, first: int, end: int) -> None:
    """Convolves a range of blocks."""
    c = _convolution_of(descriptor)
    for step in range(c.length):
        for block in range(first, end):
            _prefetch(c.x, batch, step, block)
            total = _taps_of(c, batch, step, block, scratch)
            _write(c, c.written, batch, step, block, total * sigmoid(total), scratch)


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
        + (step + _ROWS_AHEAD) * plane.step
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
    d = descriptor + 8 * NUM_CONVOLUTION_PLANES * PLANE_INTEGERS
    return Convolution(
        plane_of(descriptor, 0), plane_of(descriptor, 1), plane_of(descriptor, 2), plane_of(descriptor, 3),
        plane_of(descriptor, 4), integer(d), integer(d + 8), integer(d + 16), integer(d + 24), integer(d + 32),
        integer(d + 40), integer(d + 48), integer(d + 56), integer(d + 64),
    )  # fmt: skip
