"""The compiled kernels of the CPU scan: a call does some tiles of one sample, over the whole sequence.

For each chunk of steps and tile of channels the inputs are brought into scratch rows, whatever their strides and dtype;
then four states at a time run through the chunk in registers. The forward pass leaves the state before each chunk; the
backward pass starts from it, recomputes the states of one chunk, and runs through them against the order of the scan.

Each value is written by one tile or slab only and summed in one order: results do not depend on the number of threads.
"""

from typing import Any

from storm_vlm.ops._cpu_elements import read_one, sum_rows, write_one
from storm_vlm.ops._cpu_layout import (
    BLOCK_BYTES,
    CHUNK_STEPS,
    FLOAT32,
    LANES,
    ROW_BYTES,
    STATES,
    TILE_BYTES,
    Problem,
    Rows,
    Tile,
)
from storm_vlm.ops._cpu_places import (
    checkpoint_address,
    locate,
    next_tile,
    problem_of,
    scratch_rows,
    tile_offset,
    weights_address,
)
from storm_vlm.ops._cpu_planes import prefetch_planes, read_planes, write_planes
from storm_vlm.ops._cpu_vector import (
    add_dot,
    exp2,
    fma,
    inline,
    load16,
    load64,
    repeat,
    sigmoid,
    softplus,
    spread,
    store,
    zeros64,
)

_LN2 = 0.6931471805599453
Vector = Any


def scan_forward(descriptor: int, scratch: int, batch: int, first_tile: int, end_tile: int) -> None:
    """Computes output and last state of a range of tiles; ``state`` holds the first state and gets the last."""
    problem = problem_of(descriptor)
    rows = scratch_rows(scratch, problem.states)
    tile_bytes = problem.states * ROW_BYTES
    chunks = (problem.length + CHUNK_STEPS - 1) // CHUNK_STEPS
    for k in range(chunks):
        chunk = chunks - 1 - k if problem.reverse else k
        start = chunk * CHUNK_STEPS
        steps = min(CHUNK_STEPS, problem.length - start)
        for index in range(first_tile, end_tile):
            tile = locate(problem, batch, index)
            following, place = next_tile(problem, tile, first_tile, end_tile, start, 1)
            prefetch_planes(descriptor, following, place)
            state = problem.state + tile_offset(problem, tile, tile_bytes)
            if problem.checkpoints:
                copy_blocks(state, checkpoint_address(problem, tile, chunks, chunk), tile_bytes)
            read_planes(descriptor, tile, start, steps, scratch)
            _begin_steps(problem, tile, steps, chunk, chunks, rows)
            if problem.has_ungated:
                _add_rows(rows.ungated, rows.y, steps)
            B = weights_address(problem.B, tile, problem.states, start)
            C = weights_address(problem.C, tile, problem.states, start)
            for block in range(problem.states // STATES):
                part = block * BLOCK_BYTES
                a = load64(problem.A + index * tile_bytes + part)
                h = _run_states(problem, B, C, block, steps, load64(state + part), a, rows)
                store(state + part, h)
            if problem.has_total:
                copy_blocks(rows.y, rows.total, steps * ROW_BYTES)
            if problem.is_gated:
                for i in range(0, steps * ROW_BYTES, BLOCK_BYTES):
                    gate = load64(rows.z + i)
                    store(rows.y + i, load64(rows.y + i) * gate * sigmoid(gate))
            write_planes(descriptor, tile, start, steps, scratch)


def scan_backward(descriptor: int, scratch: int, batch: int, first_tile: int, end_tile: int) -> None:
    """Computes the gradients of a range of tiles, whole slabs; ``state`` holds the last state's and gets the first's."""
    problem = problem_of(descriptor)
    rows = scratch_rows(scratch, problem.states)
    chunks = (problem.length + CHUNK_STEPS - 1) // CHUNK_STEPS
    for k in range(chunks):
        chunk = k if problem.reverse else chunks - 1 - k
        start = chunk * CHUNK_STEPS
        steps = min(CHUNK_STEPS, problem.length - start)
        for index in range(first_tile, end_tile):
            tile = locate(problem, batch, index)
            following, place = next_tile(problem, tile, first_tile, end_tile, start, 0)
            prefetch_planes(descriptor, following, place)
            if tile.opens_slab:
                for i in range(0, 2 * problem.states * TILE_BYTES, BLOCK_BYTES):
                    store(rows.grad_B + i, zeros64())
            read_planes(descriptor, tile, start, steps, scratch)
            _begin_steps(problem, tile, steps, chunk, chunks, rows)
            _gate_gradient(problem, steps, rows)
            _block_gradients(
                problem, tile, start, steps, checkpoint_address(problem, tile, chunks, chunk), rows
            )
            _finish_gradients(problem, tile, steps, rows)
            write_planes(descriptor, tile, start, steps, scratch)
            if tile.closes_slab and problem.B.step:
                _close_slab(problem, tile, start, steps, rows.grad_B, problem.grad_B)
            if tile.closes_slab and problem.C.step:
                _close_slab(problem, tile, start, steps, rows.grad_C, problem.grad_C)


@inline
def _project_delta(problem: Problem, tile: Tile, chunk: int, chunks: int, rows: Rows) -> None:
    """Fills the rows of ``raw`` with the product of low-rank time steps and a tile's weights."""
    weights = problem.delta_weight + tile.number * problem.rank * ROW_BYTES
    columns = problem.low_rank + (tile.batch * chunks + chunk) * problem.rank * ROW_BYTES
    first, second, third, fourth = zeros64(), zeros64(), zeros64(), zeros64()
    for r in range(0, problem.rank * ROW_BYTES, ROW_BYTES):
        row = repeat(load16(weights + r))
        # Each reads one column's numbers of four steps.
        first = fma(spread(columns + r), row, first)
        second = fma(spread(columns + r + 4 * STATES), row, second)
        third = fma(spread(columns + r + 8 * STATES), row, third)
        fourth = fma(spread(columns + r + 12 * STATES), row, fourth)
    store(rows.raw, first)
    store(rows.raw + BLOCK_BYTES, second)
    store(rows.raw + 2 * BLOCK_BYTES, third)
    store(rows.raw + 3 * BLOCK_BYTES, fourth)


@inline
def _begin_steps(problem: Problem, tile: Tile, steps: int, chunk: int, chunks: int, rows: Rows) -> None:
    """Adds the bias to the rows of ``raw``, and fills ``delta``, ``x = delta u`` and ``y = D u``."""
    if problem.rank:
        _project_delta(problem, tile, chunk, chunks, rows)
    bias = repeat(load16(problem.delta_bias + tile.number * ROW_BYTES))
    skip = repeat(load16(problem.D + tile.number * ROW_BYTES))
    for i in range(0, steps * ROW_BYTES, BLOCK_BYTES):
        raw = load64(rows.raw + i) + bias
        delta = softplus(raw) if problem.softplus else raw
        u = load64(rows.u + i)
        store(rows.raw + i, raw)
        store(rows.delta + i, delta)
        store(rows.x + i, delta * u)
        store(rows.y + i, skip * u)


@inline
def weight(address: int, step: int, i: int, block: int) -> Vector:
    """Returns B or C of four states at step i of a chunk."""
    if step == 0:
        return load64(address + block * BLOCK_BYTES)
    return spread(address + i * step + block * 4 * STATES)


@inline
def _run_states(
    problem: Problem, B: int, C: int, block: int, steps: int, h: Vector, a: Vector, rows: Rows
) -> Vector:
    """Runs four states through a chunk, adds their output to y and returns the last state."""
    for k in range(steps):
        i = steps - 1 - k if problem.reverse else k
        row = i * ROW_BYTES
        drive = repeat(load16(rows.x + row)) * weight(B, problem.B.step, i, block)
        h = fma(exp2(repeat(load16(rows.delta + row)) * a), h, drive)
        store(rows.y + row, add_dot(load16(rows.y + row), h, weight(C, problem.C.step, i, block)))
    return h


@inline
def _gate_gradient(problem: Problem, steps: int, rows: Rows) -> None:
    """Fills ``grad_y``, the gradient of the output before the gate, and clears the sums of the states."""
    for i in range(0, steps * ROW_BYTES, BLOCK_BYTES):
        gradient = load64(rows.grad_out + i)
        if problem.is_gated:
            gate = load64(rows.z + i)
            gradient = gradient * gate * sigmoid(gate)
        store(rows.grad_y + i, gradient)
        store(rows.grad_x + i, zeros64())
        store(rows.grad_decay + i, zeros64())


@inline
def _block_gradients(
    problem: Problem, tile: Tile, start: int, steps: int, checkpoint: int, rows: Rows
) -> None:
    """Recomputes the states of a chunk, four at a time, and runs their gradients through it."""
    tile_bytes = problem.states * ROW_BYTES
    offset = tile_offset(problem, tile, tile_bytes)
    B = weights_address(problem.B, tile, problem.states, start)
    C = weights_address(problem.C, tile, problem.states, start)
    for block in range(problem.states // STATES):
        part = block * BLOCK_BYTES
        a = load64(problem.A + tile.number * tile_bytes + part)
        _recompute_states(problem, B, C, block, steps, load64(checkpoint + part), a, rows)
        grad_B = (rows.grad_B if problem.B.step else problem.grad_B + offset) + part
        grad_C = (rows.grad_C if problem.C.step else problem.grad_C + offset) + part
        adjoint = load64(problem.state + offset + part)
        grad_a = load64(problem.grad_A + offset + part)
        adjoint, grad_a = _run_adjoint(problem, B, C, grad_B, grad_C, block, steps, adjoint, a, grad_a, rows)
        store(problem.state + offset + part, adjoint)
        store(problem.grad_A + offset + part, grad_a)


@inline
def _recompute_states(
    problem: Problem, B: int, C: int, block: int, steps: int, h: Vector, a: Vector, rows: Rows
) -> None:
    """Runs four states through a chunk again and keeps each state and decay, in the order of the scan."""
    for k in range(steps):
        i = steps - 1 - k if problem.reverse else k
        row = i * ROW_BYTES
        decay = exp2(repeat(load16(rows.delta + row)) * a)
        store(rows.before + k * BLOCK_BYTES, h)
        store(rows.decay + k * BLOCK_BYTES, decay)
        h = fma(decay, h, repeat(load16(rows.x + row)) * weight(B, problem.B.step, i, block))
        if problem.is_gated and not problem.has_ungated:
            store(rows.y + row, add_dot(load16(rows.y + row), h, weight(C, problem.C.step, i, block)))
    store(rows.before + steps * BLOCK_BYTES, h)


@inline
def _run_adjoint(
    problem: Problem,
    B: int,
    C: int,
    grad_B: int,
    grad_C: int,
    block: int,
    steps: int,
    adjoint: Vector,
    a: Vector,
    grad_a: Vector,
    rows: Rows,
) -> tuple[Vector, Vector]:
    """Runs the gradient of four states against the scan; returns it before the chunk, and the gradient of A."""
    states_bytes = problem.states * ROW_BYTES
    for k in range(steps - 1, -1, -1):
        i = steps - 1 - k if problem.reverse else k
        row = i * ROW_BYTES
        grad_y = repeat(load16(rows.grad_y + row))
        grad_h = fma(grad_y, weight(C, problem.C.step, i, block), adjoint)
        sums_C = grad_C + (0 if problem.C.step == 0 else i * states_bytes)
        sums_B = grad_B + (0 if problem.B.step == 0 else i * states_bytes)
        _accumulate(sums_C, load64(rows.before + (k + 1) * BLOCK_BYTES) * grad_y)
        _accumulate(sums_B, grad_h * repeat(load16(rows.x + row)))
        grad_x = add_dot(load16(rows.grad_x + row), grad_h, weight(B, problem.B.step, i, block))
        store(rows.grad_x + row, grad_x)
        adjoint = load64(rows.decay + k * BLOCK_BYTES) * grad_h
        through_decay = adjoint * load64(rows.before + k * BLOCK_BYTES)
        store(rows.grad_decay + row, add_dot(load16(rows.grad_decay + row), through_decay, a))
        grad_a = fma(through_decay, repeat(load16(rows.delta + row)), grad_a)
    return adjoint, grad_a


@inline
def _finish_gradients(problem: Problem, tile: Tile, steps: int, rows: Rows) -> None:
    """Turns the sums of a chunk's states into the gradients of ``u``, ``delta``, ``z``, ``D`` and ``delta_bias``."""
    offset = tile_offset(problem, tile, ROW_BYTES)
    skip = load16(problem.D + tile.number * ROW_BYTES)
    grad_D = load16(problem.grad_D + offset)
    grad_bias = load16(problem.grad_delta_bias + offset)
    gated = rows.ungated if problem.has_ungated else rows.y
    for i in range(0, steps * ROW_BYTES, ROW_BYTES):
        u, delta, grad_x = load16(rows.u + i), load16(rows.delta + i), load16(rows.grad_x + i)
        grad_y = load16(rows.grad_y + i)
        grad_delta = fma(grad_x, u, load16(rows.grad_decay + i) * _LN2)
        if problem.softplus:
            grad_delta = grad_delta * sigmoid(load16(rows.raw + i))
        if problem.is_gated:
            gate = load16(rows.z + i)
            s = sigmoid(gate)
            slope = s * fma(gate, 1.0 - s, 1.0)
            store(rows.grad_z + i, load16(rows.grad_out + i) * load16(gated + i) * slope)
        grad_D = fma(grad_y, u, grad_D)
        grad_bias = grad_bias + grad_delta
        store(rows.grad_x + i, fma(grad_x, delta, skip * grad_y))
        store(rows.grad_decay + i, grad_delta)
    store(problem.grad_D + offset, grad_D)
    store(problem.grad_delta_bias + offset, grad_bias)


@inline
def _close_slab(problem: Problem, tile: Tile, start: int, steps: int, sums: int, target: int) -> None:
    """Sums the channels of a slab's gradient of B or C and writes it to ``(slab, b, group, step, n)``."""
    place = (
        (tile.slab * problem.batches + tile.batch) * problem.groups + tile.group
    ) * problem.length + start
    address = target + place * problem.states * 4
    count = steps * problem.states
    done = 0
    while done + LANES <= count:
        store(address + 4 * done, sum_rows(sums + done * ROW_BYTES))
        done += LANES
    if done < count:
        # The rows that follow are scratch: their sums are computed and not written.
        rest = sum_rows(sums + done * ROW_BYTES)
        store(sums, rest)
        for i in range(count - done):
            write_one(address + 4 * (done + i), FLOAT32, read_one(sums + 4 * i, FLOAT32))


@inline
def copy_blocks(source: int, target: int, num_bytes: int) -> None:
    for i in range(0, num_bytes, BLOCK_BYTES):
        store(target + i, load64(source + i))


@inline
def _add_rows(source: int, target: int, steps: int) -> None:
    for i in range(0, steps * ROW_BYTES, BLOCK_BYTES):
        store(target + i, load64(source + i) + load64(target + i))


@inline
def _accumulate(address: int, value: Vector) -> None:
    store(address, load64(address) + value)
