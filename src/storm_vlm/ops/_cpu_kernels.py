"""The compiled kernels of the CPU scan: one call does one slab of channels of one sample, over the whole sequence.

A slab is up to `SLAB_TILES` tiles of 16 channels that share B and C. Time runs in chunks of `CHUNK_STEPS` steps. For
each chunk and tile the inputs are brought into scratch rows of 16 channels, whatever their strides and dtype; then four
states at a time run through the chunk in registers. The forward pass leaves the state before each chunk; the backward
pass starts from it, recomputes the states of one chunk, and runs through them against the order of the scan.

Layouts, all float32: a tile's states are ``(n, 16)`` with n padded to a multiple of four; tables ``(tile, n, 16)``;
scratch rows ``(step, 16)``. Each value is written by one slab only and summed in one order, so that results do not
depend on the number of threads.
"""

from typing import NamedTuple

from numba import njit, types

from storm_vlm.ops._cpu_vector import (
    BLOCK_BYTES,
    FLOAT32,
    LANES,
    ROW_BYTES,
    STATES,
    add_dot,
    exp2,
    fma,
    inline,
    load16,
    load64,
    prefetch,
    read_one,
    read_row,
    repeat,
    sigmoid,
    softplus,
    spread,
    store,
    sum_rows,
    transpose_square,
    write_one,
    write_row,
    zeros64,
)

CHUNK_STEPS = 32
SLAB_TILES = 4
# Each plane has the scratch row of its number; those before `out` are read, the others written, where there are any.
PLANES = ("u", "delta", "z", "grad_out", "out", "grad_u", "grad_delta", "grad_z")
_FIRST_WRITTEN = PLANES.index("out")
_PLANE_FIELDS = 5
_LN2 = 0.6931471805599453
_TILE_ROWS = CHUNK_STEPS * ROW_BYTES


class Plane(NamedTuple):
    """A ``(b, d, l)`` tensor in memory: address (0 if there is none), element type, strides in bytes."""

    address: int
    dtype: int
    batch: int
    channel: int
    step: int


class Weights(NamedTuple):
    """B or C: rows of n floats for each step of a group, or, with ``step`` 0, a table of states of each tile."""

    address: int
    batch: int
    group: int
    step: int


class Problem(NamedTuple):
    """What a kernel works on besides planes; what only the backward pass needs is 0 in the forward pass."""

    is_gated: int
    B: Weights
    C: Weights
    length: int
    groups: int
    group_channels: int
    states: int
    softplus: int
    reverse: int
    # Tables: (tile, n, 16) or (tile, 16)
    A: int
    D: int
    delta_bias: int
    # (b, tile, n, 16): before the first step and after the last, or their gradients in the backward pass
    state: int
    checkpoints: int  # (b, chunk, tile, n, 16), 0 to keep none
    # Sums of the slab: (b, tile, ...), and for B and C (slab of the group, b, group, step, n) or (b, tile, n, 16)
    grad_A: int
    grad_D: int
    grad_delta_bias: int
    grad_B: int
    grad_C: int
    batches: int


class _Tile(NamedTuple):
    """Where a tile lies."""

    batch: int
    index: int  # among all tiles
    group: int
    slab: int  # among the slabs of its group
    opens_slab: bool
    closes_slab: bool
    channel: int
    channels: int  # 16, or what is left of the group


class _Rows(NamedTuple):
    """Addresses of scratch: ``(step, 16)`` rows, first those of the planes, then ``(step, 64)`` blocks."""

    u: int
    raw: int  # delta with its bias, before softplus
    z: int
    grad_out: int
    y: int
    grad_x: int
    grad_decay: int  # gradient of delta through the decay, over ln 2
    grad_z: int
    delta: int
    x: int
    grad_y: int
    decay: int
    before: int  # one more block than steps: the state after the chunk
    grad_B: int  # (step, n, 16), summed over the tiles of a slab
    grad_C: int


_NUM_ROWS = 11


@inline
def _rows(scratch, states):
    blocks = scratch + _NUM_ROWS * _TILE_ROWS
    sums = blocks + (2 * CHUNK_STEPS + 1) * BLOCK_BYTES
    return _Rows(
        scratch, scratch + _TILE_ROWS, scratch + 2 * _TILE_ROWS, scratch + 3 * _TILE_ROWS,
        scratch + 4 * _TILE_ROWS, scratch + 5 * _TILE_ROWS, scratch + 6 * _TILE_ROWS, scratch + 7 * _TILE_ROWS,
        scratch + 8 * _TILE_ROWS, scratch + 9 * _TILE_ROWS, scratch + 10 * _TILE_ROWS,
        blocks, blocks + CHUNK_STEPS * BLOCK_BYTES, sums, sums + states * _TILE_ROWS,
    )  # fmt: skip


@inline
def _plane(d, number):
    """Reads a plane from the beginning of the descriptor."""
    i = number * _PLANE_FIELDS
    return Plane(d[i], d[i + 1], d[i + 2], d[i + 3], d[i + 4])


@inline
def _problem(d):
    """Reads the fields of `Problem`, flattened, that follow the planes in the descriptor."""
    i = len(PLANES) * _PLANE_FIELDS
    return Problem(
        d[i], Weights(d[i + 1], d[i + 2], d[i + 3], d[i + 4]), Weights(d[i + 5], d[i + 6], d[i + 7], d[i + 8]),
        d[i + 9], d[i + 10], d[i + 11], d[i + 12], d[i + 13], d[i + 14], d[i + 15], d[i + 16], d[i + 17],
        d[i + 18], d[i + 19], d[i + 20], d[i + 21], d[i + 22], d[i + 23], d[i + 24], d[i + 25],
    )  # fmt: skip


@inline
def _group_tiles(problem):
    return (problem.group_channels + LANES - 1) // LANES


@inline
def _locate(problem, batch, index):
    """Returns the tile with this number."""
    group_tiles = _group_tiles(problem)
    group, place = divmod(index, group_tiles)
    return _Tile(
        batch, index, group, place // SLAB_TILES,
        place % SLAB_TILES == 0, place % SLAB_TILES == SLAB_TILES - 1 or place == group_tiles - 1,
        group * problem.group_channels + place * LANES,
        min(LANES, problem.group_channels - place * LANES),
    )  # fmt: skip


@inline
def _tile_row(problem, tile, row_bytes):
    """Returns the offset of a tile in a table of ``(b, tile, row)``."""
    return (tile.batch * problem.groups * _group_tiles(problem) + tile.index) * row_bytes


@inline
def _read_tile(plane, tile, start, steps, rows):
    """Brings 16 channels (or as many as there are, then zeros) of some steps into scratch rows."""
    size = 4 if plane.dtype == FLOAT32 else 2
    base = plane.address + tile.batch * plane.batch + tile.channel * plane.channel + start * plane.step
    done = 0
    if tile.channels == LANES and plane.channel == size:
        for i in range(steps):
            store(rows + i * ROW_BYTES, read_row(base + i * plane.step, plane.dtype))
        done = steps
    elif tile.channels == LANES and plane.step == size:
        while done + LANES <= steps:
            square = rows + done * ROW_BYTES
            for c in range(LANES):
                store(square + c * ROW_BYTES, read_row(base + c * plane.channel + done * size, plane.dtype))
            transpose_square(square)
            done += LANES
    for i in range(done, steps):
        for c in range(LANES):
            place = base + c * plane.channel + i * plane.step
            value = read_one(place, plane.dtype) if c < tile.channels else types.float32(0.0)
            write_one(rows + i * ROW_BYTES + 4 * c, FLOAT32, value)


@inline
def _write_tile(plane, tile, start, steps, rows):
    """Writes scratch rows to 16 channels (or as many as there are) of some steps; the rows are lost."""
    size = 4 if plane.dtype == FLOAT32 else 2
    base = plane.address + tile.batch * plane.batch + tile.channel * plane.channel + start * plane.step
    done = 0
    if tile.channels == LANES and plane.channel == size:
        for i in range(steps):
            write_row(base + i * plane.step, plane.dtype, load16(rows + i * ROW_BYTES))
        done = steps
    elif tile.channels == LANES and plane.step == size:
        while done + LANES <= steps:
            square = rows + done * ROW_BYTES
            transpose_square(square)
            for c in range(LANES):
                row = load16(square + c * ROW_BYTES)
                write_row(base + c * plane.channel + done * size, plane.dtype, row)
            done += LANES
    for i in range(done, steps):
        for c in range(tile.channels):
            value = read_one(rows + i * ROW_BYTES + 4 * c, FLOAT32)
            write_one(base + c * plane.channel + i * plane.step, plane.dtype, value)


@inline
def _prefetch_tile(plane, tile, start, steps):
    """Asks for a tile of a later chunk: the hardware does not foresee rows that lie thousands of bytes apart."""
    size = 4 if plane.dtype == FLOAT32 else 2
    base = plane.address + tile.batch * plane.batch + tile.channel * plane.channel + start * plane.step
    if plane.channel == size:
        for i in range(steps):
            prefetch(base + i * plane.step)
    elif plane.step == size:
        for c in range(LANES):
            for i in range(0, steps * size, ROW_BYTES):
                prefetch(base + c * plane.channel + i)


@inline
def _copy(source, target, num_bytes):
    for i in range(0, num_bytes, BLOCK_BYTES):
        store(target + i, load64(source + i))


@inline
def _weights_at(weights, tile, states, start):
    """Returns the address of B or C at a step for the first four states."""
    if weights.step == 0:
        return weights.address + tile.index * states * ROW_BYTES
    return weights.address + tile.batch * weights.batch + tile.group * weights.group + start * weights.step


@inline
def _weight(address, step, i, block):
    """Returns B or C of four states at step i of a chunk."""
    if step == 0:
        return load64(address + block * BLOCK_BYTES)
    return spread(address + i * step + block * 4 * STATES)


@inline
def _read_planes(d, tile, start, steps, scratch):
    for number in range(_FIRST_WRITTEN):
        plane = _plane(d, number)
        if plane.address:
            _read_tile(plane, tile, start, steps, scratch + number * _TILE_ROWS)


@inline
def _write_planes(d, tile, start, steps, scratch):
    for number in range(_FIRST_WRITTEN, len(PLANES)):
        plane = _plane(d, number)
        if plane.address:
            _write_tile(plane, tile, start, steps, scratch + number * _TILE_ROWS)


@inline
def _prefetch_planes(d, tile, start):
    for number in range(len(PLANES)):
        plane = _plane(d, number)
        if plane.address:
            _prefetch_tile(plane, tile, start, CHUNK_STEPS)


@inline
def _begin_steps(problem, tile, steps, rows):
    """Adds the bias to the rows of ``raw``, and fills ``delta``, ``x = delta u`` and ``y = D u``."""
    bias = repeat(load16(problem.delta_bias + tile.index * ROW_BYTES))
    skip = repeat(load16(problem.D + tile.index * ROW_BYTES))
    for i in range(0, steps * ROW_BYTES, BLOCK_BYTES):
        raw = load64(rows.raw + i) + bias
        delta = softplus(raw) if problem.softplus else raw
        u = load64(rows.u + i)
        store(rows.raw + i, raw)
        store(rows.delta + i, delta)
        store(rows.x + i, delta * u)
        store(rows.y + i, skip * u)


@inline
def _run_states(problem, B, C, block, steps, h, a, rows):
    """Runs four states through a chunk, adds their output to y and returns the last state."""
    for k in range(steps):
        i = steps - 1 - k if problem.reverse else k
        row = i * ROW_BYTES
        drive = repeat(load16(rows.x + row)) * _weight(B, problem.B.step, i, block)
        h = fma(exp2(repeat(load16(rows.delta + row)) * a), h, drive)
        store(rows.y + row, add_dot(load16(rows.y + row), h, _weight(C, problem.C.step, i, block)))
    return h


@inline
def _checkpoint(problem, tile, chunks, chunk):
    """Returns the address of the state before a chunk."""
    tiles = problem.groups * _group_tiles(problem)
    place = (tile.batch * chunks + chunk) * tiles + tile.index
    return problem.checkpoints + place * problem.states * ROW_BYTES


@inline
def _next_tile(problem, tile, first, end, start, is_forward):
    """Returns the tile that comes next and the first step of its chunk."""
    index, following = tile.index + 1, start
    if index == end:
        index = first
        following += CHUNK_STEPS if is_forward != problem.reverse else -CHUNK_STEPS
    return _locate(problem, tile.batch, index), following


@njit(nogil=True, error_model="numpy", cache=True)
def forward(descriptor, scratch, batch, first_tile, end_tile):
    """Computes output and last state of a range of tiles; ``state`` holds the first state and gets the last."""
    problem = _problem(descriptor)
    rows = _rows(scratch, problem.states)
    tile_bytes = problem.states * ROW_BYTES
    chunks = (problem.length + CHUNK_STEPS - 1) // CHUNK_STEPS
    for k in range(chunks):
        chunk = chunks - 1 - k if problem.reverse else k
        start = chunk * CHUNK_STEPS
        steps = min(CHUNK_STEPS, problem.length - start)
        for index in range(first_tile, end_tile):
            tile = _locate(problem, batch, index)
            following, place = _next_tile(problem, tile, first_tile, end_tile, start, 1)
            _prefetch_planes(descriptor, following, place)
            state = problem.state + _tile_row(problem, tile, tile_bytes)
            if problem.checkpoints:
                _copy(state, _checkpoint(problem, tile, chunks, chunk), tile_bytes)
            _read_planes(descriptor, tile, start, steps, scratch)
            _begin_steps(problem, tile, steps, rows)
            B = _weights_at(problem.B, tile, problem.states, start)
            C = _weights_at(problem.C, tile, problem.states, start)
            for block in range(problem.states // STATES):
                part = block * BLOCK_BYTES
                a = load64(problem.A + index * tile_bytes + part)
                h = _run_states(problem, B, C, block, steps, load64(state + part), a, rows)
                store(state + part, h)
            if problem.is_gated:
                for i in range(0, steps * ROW_BYTES, BLOCK_BYTES):
                    gate = load64(rows.z + i)
                    store(rows.y + i, load64(rows.y + i) * gate * sigmoid(gate))
            _write_planes(descriptor, tile, start, steps, scratch)


def scratch_bytes(states: int) -> int:
    """Returns the scratch memory that a kernel needs, with room to align it to 64 bytes."""
    return (_NUM_ROWS + 2 * states) * _TILE_ROWS + (2 * CHUNK_STEPS + 1) * BLOCK_BYTES + ROW_BYTES


@inline
def _gate_gradient(problem, steps, rows):
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
def _recompute_states(problem, B, C, block, steps, h, a, rows):
    """Runs four states through a chunk again and keeps each state and decay, in the order of the scan."""
    for k in range(steps):
        i = steps - 1 - k if problem.reverse else k
        row = i * ROW_BYTES
        decay = exp2(repeat(load16(rows.delta + row)) * a)
        store(rows.before + k * BLOCK_BYTES, h)
        store(rows.decay + k * BLOCK_BYTES, decay)
        h = fma(decay, h, repeat(load16(rows.x + row)) * _weight(B, problem.B.step, i, block))
        if problem.is_gated:
            store(rows.y + row, add_dot(load16(rows.y + row), h, _weight(C, problem.C.step, i, block)))
    store(rows.before + steps * BLOCK_BYTES, h)


@inline
def _accumulate(address, value):
    store(address, load64(address) + value)


@inline
def _run_adjoint(problem, B, C, grad_B, grad_C, block, steps, adjoint, a, grad_a, rows):
    """Runs the gradient of four states against the scan; returns it before the chunk, and the gradient of A."""
    states_bytes = problem.states * ROW_BYTES
    for k in range(steps - 1, -1, -1):
        i = steps - 1 - k if problem.reverse else k
        row = i * ROW_BYTES
        grad_y = repeat(load16(rows.grad_y + row))
        grad_h = fma(grad_y, _weight(C, problem.C.step, i, block), adjoint)
        sums_C = grad_C + (0 if problem.C.step == 0 else i * states_bytes)
        sums_B = grad_B + (0 if problem.B.step == 0 else i * states_bytes)
        _accumulate(sums_C, load64(rows.before + (k + 1) * BLOCK_BYTES) * grad_y)
        _accumulate(sums_B, grad_h * repeat(load16(rows.x + row)))
        grad_x = add_dot(load16(rows.grad_x + row), grad_h, _weight(B, problem.B.step, i, block))
        store(rows.grad_x + row, grad_x)
        adjoint = load64(rows.decay + k * BLOCK_BYTES) * grad_h
        through_decay = adjoint * load64(rows.before + k * BLOCK_BYTES)
        store(rows.grad_decay + row, add_dot(load16(rows.grad_decay + row), through_decay, a))
        grad_a = fma(through_decay, repeat(load16(rows.delta + row)), grad_a)
    return adjoint, grad_a


@inline
def _finish_gradients(problem, tile, steps, rows):
    """Turns the sums of a chunk's states into the gradients of ``u``, ``delta``, ``z``, ``D`` and ``delta_bias``."""
    offset = _tile_row(problem, tile, ROW_BYTES)
    skip = load16(problem.D + tile.index * ROW_BYTES)
    grad_D = load16(problem.grad_D + offset)
    grad_bias = load16(problem.grad_delta_bias + offset)
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
            store(rows.grad_z + i, load16(rows.grad_out + i) * load16(rows.y + i) * slope)
        grad_D = fma(grad_y, u, grad_D)
        grad_bias = grad_bias + grad_delta
        store(rows.grad_x + i, fma(grad_x, delta, skip * grad_y))
        store(rows.grad_decay + i, grad_delta)
    store(problem.grad_D + offset, grad_D)
    store(problem.grad_delta_bias + offset, grad_bias)


@inline
def _close_slab(problem, tile, start, steps, sums, target):
    """Sums the channels of a slab's gradient of B or C and writes it to ``(slab, b, group, step, n)``."""
    place = ((tile.slab * problem.batches + tile.batch) * problem.groups + tile.group) * problem.length + start
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


@njit(nogil=True, error_model="numpy", cache=True)
def backward(descriptor, scratch, batch, first_tile, end_tile):
    """Computes the gradients of a range of tiles, whole slabs; ``state`` holds the last state's and gets the first's."""
    problem = _problem(descriptor)
    rows = _rows(scratch, problem.states)
    chunks = (problem.length + CHUNK_STEPS - 1) // CHUNK_STEPS
    for k in range(chunks):
        chunk = k if problem.reverse else chunks - 1 - k
        start = chunk * CHUNK_STEPS
        steps = min(CHUNK_STEPS, problem.length - start)
        for index in range(first_tile, end_tile):
            tile = _locate(problem, batch, index)
            following, place = _next_tile(problem, tile, first_tile, end_tile, start, 0)
            _prefetch_planes(descriptor, following, place)
            if tile.opens_slab:
                for i in range(0, 2 * problem.states * _TILE_ROWS, BLOCK_BYTES):
                    store(rows.grad_B + i, zeros64())
            _read_planes(descriptor, tile, start, steps, scratch)
            _begin_steps(problem, tile, steps, rows)
            _gate_gradient(problem, steps, rows)
            _block_gradients(problem, tile, start, steps, _checkpoint(problem, tile, chunks, chunk), rows)
            _finish_gradients(problem, tile, steps, rows)
            _write_planes(descriptor, tile, start, steps, scratch)
            if tile.closes_slab and problem.B.step:
                _close_slab(problem, tile, start, steps, rows.grad_B, problem.grad_B)
            if tile.closes_slab and problem.C.step:
                _close_slab(problem, tile, start, steps, rows.grad_C, problem.grad_C)


@inline
def _block_gradients(problem, tile, start, steps, checkpoint, rows):
    """Recomputes the states of a chunk, four at a time, and runs their gradients through it."""
    tile_bytes = problem.states * ROW_BYTES
    offset = _tile_row(problem, tile, tile_bytes)
    B = _weights_at(problem.B, tile, problem.states, start)
    C = _weights_at(problem.C, tile, problem.states, start)
    for block in range(problem.states // STATES):
        part = block * BLOCK_BYTES
        a = load64(problem.A + tile.index * tile_bytes + part)
        _recompute_states(problem, B, C, block, steps, load64(checkpoint + part), a, rows)
        grad_B = (rows.grad_B if problem.B.step else problem.grad_B + offset) + part
        grad_C = (rows.grad_C if problem.C.step else problem.grad_C + offset) + part
        adjoint = load64(problem.state + offset + part)
        grad_a = load64(problem.grad_A + offset + part)
        adjoint, grad_a = _run_adjoint(
            problem, B, C, grad_B, grad_C, block, steps, adjoint, a, grad_a, rows
        )
        store(problem.state + offset + part, adjoint)
        store(problem.grad_A + offset + part, grad_a)
