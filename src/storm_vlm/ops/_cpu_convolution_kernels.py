"""The compiled kernels of the depthwise convolution: a call does some blocks of 64 channels of one sample.

Rows of channels are read one after the other as they lie in memory, each once from there: those before it are still in the
cache. The gradient keeps the last rows of what flows into the taps in a ring.
"""

from typing import Any

from storm_vlm.ops._cpu_elements import read_block, read_one, write_block, write_one
from storm_vlm.ops._cpu_layout import (
    BLOCK_BYTES,
    CHANNELS,
    FLOAT32,
    GROUP_STEPS,
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
    """Computes the gradients of a range of blocks, some steps at a time.

    First the gradient of the taps' sum at each of these steps, which goes to weight and bias; then that of the inputs that no
    later step reaches.
    """
    c = _convolution_of(descriptor)
    for start in range(0, c.length + c.taps - 1, GROUP_STEPS):
        for block in range(first, end):
            last = min(start + GROUP_STEPS, c.length)
            for step in range(start, last):
                store(_recent(c, block, step, scratch), _taps_gradient(c, batch, step, block, scratch))
            _add_weight_gradient(c, batch, block, start, last, scratch)
            for step in range(start, min(start + GROUP_STEPS, c.length + c.taps - 1)):
                _write_input_gradient(c, batch, step, block, scratch)


@inline
def _recent(c: Convolution, block: int, step: int, scratch: int) -> int:
    """Returns the place of the gradient at one of the last steps, in a ring."""
    return scratch + BLOCK_BYTES * (1 + block * c.ring + (step & (c.ring - 1)))


@inline
def _taps_gradient(c: Convolution, batch: int, step: int, block: int, scratch: int) -> Any:
    """Returns the gradient of the taps' sum at a step."""
    _prefetch(c.x, batch, step, block)
    _prefetch(c.grad_u, batch, step, block)
    total = _taps_of(c, batch, step, block, scratch)
    s = sigmoid(total)
    return _read(c, c.grad_u, batch, step, block, scratch) * s * fma(total, 1.0 - s, 1.0)


@inline
def _add_weight_gradient(c: Convolution, batch: int, block: int, start: int, end: int, scratch: int) -> None:
    """Adds what some steps give to the gradients of weight and bias."""
    place = c.grad_bias + (batch * c.blocks + block) * BLOCK_BYTES
    total = load64(place)
    for step in range(start, end):
        total = total + load64(_recent(c, block, step, scratch))
    store(place, total)
    for m in range(c.taps):
        place = c.grad_weight + ((batch * c.taps + m) * c.blocks + block) * BLOCK_BYTES
        total = load64(place)
        for step in range(start, end):
            x = _input(c, batch, step + m - c.lead, block, scratch)
            total = fma(load64(_recent(c, block, step, scratch)), x, total)
        store(place, total)


@inline
def _write_input_gradient(c: Convolution, batch: int, step: int, block: int, scratch: int) -> None:
    """Writes the gradient of the input that a step is the last to reach."""
    total = zeros64()
    for m in range(c.taps):
        if 0 <= step - m < c.length:
            total = fma(_weight(c, m, block), load64(_recent(c, block, step - m, scratch)), total)
    done = step - c.lead
    if done < 0:
        _write(c, c.grad_history, batch, done + c.lead, block, total, scratch)
    elif done >= c.length:
        _write(c, c.grad_history, batch, done - c.length, block, total, scratch)
    else:
        _write(c, c.written, batch, done, block, total, scratch)


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
        integer(d + 40), integer(d + 48), integer(d + 56), integer(d + 64), integer(d + 72),
    )  # fmt: skip
