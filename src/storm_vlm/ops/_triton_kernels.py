"""Triton kernels of the selective scan: one warp takes a block of channels through a chunk of steps, tile by tile.

A tile is `STEPS` steps of `CHANNELS` channels, kept in the order of memory in both directions; a scan against the order of
memory takes the tiles, and the steps in a tile, from the last to the first. A state is ``(STATES, CHANNELS)``: Triton
gives the last dimension to the lanes first, so 32 channels leave each lane the whole state of one channel, and fewer
channels split it over lanes. Steps of a tile are unrolled: picking and placing one is a choice of registers.

Tables are float32 with channels adjacent: states ``(n, d)``, weights ``(b, g, l, n)``, padded with zeros to `STATES`
and to whole tiles, so that they need no masks. ``log2(e)`` is multiplied into A, so that a decay is one ``exp2``.

Shapes: ``b`` batch, ``l`` sequence, ``d`` channels in groups, ``n`` state size.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
# Numbers whose divisibility would only make more variants to compile. ``adjacent`` is 1 and must not be known to be: the
# compiler would then load tables as vectors, in another layout than the one that states have.
_COUNTS = ["d", "groups", "num_tiles", "num_chunks", "chunk_tiles", "num_blocks", "adjacent"]


@triton.jit
def _place(num_chunks, groups, group_channels, first_block, num_blocks, CHANNELS: tl.constexpr):
    """Returns what a program works on: sample, chunk, group, the number of its block, first channel, channels left."""
    program = tl.program_id(0)
    block = program % num_blocks
    group = program // num_blocks % groups
    chunk = program // (num_blocks * groups) % num_chunks
    sample = program // (num_blocks * groups) // num_chunks
    begin = (first_block + block) * CHANNELS
    return sample.to(tl.int64), chunk, group, block, group * group_channels + begin, group_channels - begin


@triton.jit
def _pick(tile, step: tl.constexpr):
    """Returns one step of ``(STEPS, STATES, CHANNELS)``; integer sums with zero vanish in the compiler, which those of floats do not."""
    steps = tl.arange(0, tile.shape[0])[:, None, None]
    bits = tl.where(steps == step, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def _checkpoint(
    sample, tile, group, block, groups, num_tiles, round_channels, adjacent,
    STATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Returns where the state before a tile is, in a table ``(b, tiles, g, n, channels of this round)``."""
    row = (sample * num_tiles + tile) * groups + group
    channels = block * CHANNELS + tl.arange(0, CHANNELS)
    states = tl.arange(0, STATES) * round_channels
    return row * STATES * round_channels + states[None, :, None] + channels[None, None, :] * adjacent


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(x * -_LOG2_E))


@triton.jit
def _softplus(x):
    """Returns ``log(1 + exp(x))`` as ``max(x, 0) + log1p(e)``, ``e = exp(-|x|)``, by the series of ``2 atanh(e / (2 + e))``."""
    e = tl.exp2(tl.abs(x) * -_LOG2_E)
    s = e / (2 + e)
    square = s * s
    series = 1 / 15 + square * (1 / 17)
    series = 1 / 13 + square * series
    series = 1 / 11 + square * series
    series = 1 / 9 + square * series
    series = 1 / 7 + square * series
    series = 1 / 5 + square * series
    series = 1 / 3 + square * series
    # The comparison is false for NaN, which must come through.
    return tl.where(x < 0, 0.0, x) + 2 * s * (1 + square * series)


@triton.jit
def _load_tile(pointer, start, stride_l, stride_d, inside):
    """Returns a tile as float32; zeros outside."""
    steps, channels = tl.arange(0, inside.shape[0])[:, None], tl.arange(0, inside.shape[1])[None, :]
    offsets = steps * stride_l + channels * stride_d
    return tl.load(pointer + start * stride_l + offsets, mask=inside, other=0).to(tl.float32)


@triton.jit
def _store_tile(pointer, start, stride_l, stride_d, inside, tile):
    steps, channels = tl.arange(0, inside.shape[0])[:, None], tl.arange(0, inside.shape[1])[None, :]
    offsets = steps * stride_l + channels * stride_d
    tl.store(pointer + start * stride_l + offsets, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _load_channels(pointer, first, left, CHANNELS: tl.constexpr, IS_THERE: tl.constexpr):
    """Returns a number of each channel, ``(1, CHANNELS)``; 0 if there are none."""
    numbers = 0.0
    if IS_THERE:
        channels = tl.arange(0, CHANNELS)
        numbers = tl.load(pointer + first + channels, mask=channels < left, other=0.0)[None, :]
    return numbers


@triton.jit
def _time_step(raw, inside, SOFTPLUS: tl.constexpr):
    """Returns ``delta`` after softplus; steps outside have 0 and leave the state alone."""
    delta = raw
    if SOFTPLUS:
        delta = _softplus(raw)
    return tl.where(inside, delta, 0.0)


@triton.jit
def _spread(tile, STATES: tl.constexpr):
    """Returns a tile for all states: the layout of three dimensions gives each lane all steps of its channels."""
    return tl.broadcast_to(tile[:, None, :], [tile.shape[0], STATES, tile.shape[1]])


@triton.jit(do_not_specialize=[*_COUNTS, "weight_groups", "first_block", "round_channels"])
def run_states(
    values, delta, z, A, weights, delta_bias, starts, ends, totals, checkpoints,
    value_b, value_d, value_l, delta_b, delta_d, delta_l, z_b, z_d, z_l,
    length, d, groups, group_channels, weight_groups, num_tiles, num_chunks, chunk_tiles,
    first_block, num_blocks, round_channels, adjacent,
    ADJOINT: tl.constexpr, KEEP: tl.constexpr, DESCENDING: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, CONSTANT: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Runs the states of each chunk without outputs.

    Without KEEP from zero: writes each chunk's last state and its sum of ``delta``. With KEEP from ``starts``: writes
    the state before each tile. With ADJOINT the state is the gradient of the state before a step, ``values`` the
    gradient of the output and ``weights`` C; else the state of the scan, ``u`` and B. ``z`` is read with ADJOINT only.
    """
    sample, chunk, group, block, first, left = _place(
        num_chunks, groups, group_channels, first_block, num_blocks, CHANNELS
    )
    channels, states, steps = tl.arange(0, CHANNELS), tl.arange(0, STATES), tl.arange(0, STEPS)
    present = channels < left
    of_channels = present[None, None, :]
    of_state = states[None, :, None] * d + (first + channels[None, None, :]) * adjacent
    decay_rates = tl.load(A + of_state, mask=of_channels, other=0.0)
    bias = _load_channels(delta_bias, first, left, CHANNELS, HAS_BIAS)
    values += sample * value_b + first.to(tl.int64) * value_d
    delta += sample * delta_b + first.to(tl.int64) * delta_d
    z += sample * z_b + first.to(tl.int64) * z_d
    if CONSTANT:
        weight = tl.load(weights + of_state, mask=of_channels, other=0.0)
    else:
        weights += (sample * weight_groups + group * weight_groups // groups) * num_tiles * STEPS * STATES

    BEGIN: tl.constexpr = STEPS - 1 if DESCENDING else 0
    END: tl.constexpr = -1 if DESCENDING else STEPS
    STRIDE: tl.constexpr = -1 if DESCENDING else 1
    row = sample * num_chunks + chunk
    if KEEP:
        state = tl.load(starts + row * STATES * d + of_state, mask=of_channels, other=0.0)
    else:
        state = tl.zeros([1, STATES, CHANNELS], tl.float32)
    total = tl.zeros([STEPS, CHANNELS], tl.float32)
    first_tile = chunk * chunk_tiles
    count = tl.minimum(chunk_tiles, num_tiles - first_tile)
    for i in tl.range(0, count, num_stages=STAGES):
        tile = first_tile + count - 1 - i if DESCENDING else first_tile + i
        if KEEP:
            place = _checkpoint(
                sample, tile, group, block, groups, num_tiles, round_channels, adjacent, STATES, CHANNELS
            )
            tl.store(checkpoints + place, state, mask=of_channels)
        start = tile.to(tl.int64) * STEPS
        inside = (start + steps < length)[:, None] & present[None, :]
        raw = _load_tile(delta, start, delta_l, delta_d, inside) + bias
        step_delta = _time_step(raw, inside, SOFTPLUS)
        total += step_delta
        x = _load_tile(values, start, value_l, value_d, inside)
        if ADJOINT:
            if HAS_Z:
                gate = _load_tile(z, start, z_l, z_d, inside)
                x *= gate * _sigmoid(gate)
        else:
            x *= step_delta
        deltas = _spread(step_delta, STATES)
        xs = _spread(x, STATES)
        for j in tl.static_range(BEGIN, END, STRIDE):
            decay = tl.exp2(_pick(deltas, j) * decay_rates)
            if not CONSTANT:
                weight = tl.load(weights + (start + j) * STATES + states)[None, :, None]
            added = _pick(xs, j) * weight
            state = decay * (state + added) if ADJOINT else decay * state + added
    if not KEEP:
        tl.store(ends + row * STATES * d + of_state, state, mask=of_channels)
        tl.store(totals + row * d + first + channels, tl.sum(total, axis=0), mask=present)


@triton.jit(do_not_specialize=["num_chunks"])
def carry(
    first_state, states, totals, A, d, num_chunks,
    DESCENDING: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Replaces the state at the end of each chunk from zero by the true state before the chunk, chunk after chunk."""
    blocks = tl.cdiv(d, CHANNELS)
    program = tl.program_id(0)
    sample = (program // blocks // STATES).to(tl.int64)
    channels = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    present = channels < d
    of_state = program // blocks % STATES * d + channels
    decay_rates = tl.load(A + of_state, mask=present, other=0.0)
    state = tl.load(first_state + sample * STATES * d + of_state, mask=present, other=0.0)
    for i in tl.range(0, num_chunks, num_stages=STAGES):
        row = sample * num_chunks + num_chunks - 1 - i if DESCENDING else sample * num_chunks + i
        end = tl.load(states + row * STATES * d + of_state, mask=present, other=0.0)
        total = tl.load(totals + row * d + channels, mask=present, other=0.0)
        tl.store(states + row * STATES * d + of_state, state, mask=present)
        state = tl.exp2(total * decay_rates) * state + end


@triton.jit(do_not_specialize=[*_COUNTS, "B_groups", "C_groups"])
def forward(
    u, delta, z, out, A, B, C, D, delta_bias, starts, last_state,
    u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, out_b, out_d, out_l,
    length, d, groups, group_channels, B_groups, C_groups, num_tiles, num_chunks, chunk_tiles, num_blocks, adjacent,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Runs each chunk from the true state before it; writes the output and the last state."""
    sample, chunk, group, _, first, left = _place(num_chunks, groups, group_channels, 0, num_blocks, CHANNELS)
    channels, states, steps = tl.arange(0, CHANNELS), tl.arange(0, STATES), tl.arange(0, STEPS)
    present = channels < left
    of_channels = present[None, None, :]
    of_state = states[None, :, None] * d + (first + channels[None, None, :]) * adjacent
    decay_rates = tl.load(A + of_state, mask=of_channels, other=0.0)
    bias = _load_channels(delta_bias, first, left, CHANNELS, HAS_BIAS)
    skip = _load_channels(D, first, left, CHANNELS, HAS_D)
    u += sample * u_b + first.to(tl.int64) * u_d
    delta += sample * delta_b + first.to(tl.int64) * delta_d
    z += sample * z_b + first.to(tl.int64) * z_d
    out += sample * out_b + first.to(tl.int64) * out_d
    if CONSTANT_B:
        B_row = tl.load(B + of_state, mask=of_channels, other=0.0)
    else:
        B += (sample * B_groups + group * B_groups // groups) * num_tiles * STEPS * STATES
    if CONSTANT_C:
        C_row = tl.load(C + of_state, mask=of_channels, other=0.0)
    else:
        C += (sample * C_groups + group * C_groups // groups) * num_tiles * STEPS * STATES

    BEGIN: tl.constexpr = STEPS - 1 if REVERSE else 0
    END: tl.constexpr = -1 if REVERSE else STEPS
    STRIDE: tl.constexpr = -1 if REVERSE else 1
    row = sample * num_chunks + chunk
    state = tl.load(starts + row * STATES * d + of_state, mask=of_channels, other=0.0)
    first_tile = chunk * chunk_tiles
    count = tl.minimum(chunk_tiles, num_tiles - first_tile)
    for i in tl.range(0, count, num_stages=STAGES):
        tile = first_tile + count - 1 - i if REVERSE else first_tile + i
        start = tile.to(tl.int64) * STEPS
        inside = (start + steps < length)[:, None] & present[None, :]
        raw = _load_tile(delta, start, delta_l, delta_d, inside) + bias
        step_delta = _time_step(raw, inside, SOFTPLUS)
        step_u = _load_tile(u, start, u_l, u_d, inside)
        if HAS_Z:
            gate = _load_tile(z, start, z_l, z_d, inside)
        deltas = _spread(step_delta, STATES)
        xs = _spread(step_delta * step_u, STATES)
        y = tl.zeros([STEPS, CHANNELS], tl.float32)
        for j in tl.static_range(BEGIN, END, STRIDE):
            if not CONSTANT_B:
                B_row = tl.load(B + (start + j) * STATES + states)[None, :, None]
            if not CONSTANT_C:
                C_row = tl.load(C + (start + j) * STATES + states)[None, :, None]
            decay = tl.exp2(_pick(deltas, j) * decay_rates)
            state = decay * state + _pick(xs, j) * B_row
            y = tl.where((steps == j)[:, None], tl.sum(state * C_row, axis=1), y)
        if HAS_D:
            y += skip * step_u
        if HAS_Z:
            y *= gate * _sigmoid(gate)
        _store_tile(out, start, out_l, out_d, inside, y)
    last_chunk = 0 if REVERSE else num_chunks - 1
    if chunk == last_chunk:
        tl.store(last_state + sample * STATES * d + of_state, state, mask=of_channels)


@triton.jit(do_not_specialize=[*_COUNTS, "B_groups", "C_groups", "first_block", "round_channels"])
def backward(
    u, delta, z, grad_out, A, B, C, D, delta_bias, starts, checkpoints,
    grad_u, grad_delta, grad_z, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_first,
    u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, out_b, out_d, out_l,
    gu_b, gu_d, gu_l, gdelta_b, gdelta_d, gdelta_l, gz_b, gz_d, gz_l,
    length, d, groups, group_channels, B_groups, C_groups, num_tiles, num_chunks, chunk_tiles,
    first_block, num_blocks, round_channels, adjacent,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr,
    STATES: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Runs each chunk against the order of the scan from the true gradient of the state after it.

    A tile's states are recomputed from its checkpoint and held in registers. Writes the gradients of ``u``, ``delta``
    and ``z``, this block's part of those of B and C, and this chunk's part of all others.
    """
    sample, chunk, group, block, first, left = _place(
        num_chunks, groups, group_channels, first_block, num_blocks, CHANNELS
    )
    channels, states, steps = tl.arange(0, CHANNELS), tl.arange(0, STATES), tl.arange(0, STEPS)
    present = channels < left
    of_channels = present[None, None, :]
    of_state = states[None, :, None] * d + (first + channels[None, None, :]) * adjacent
    decay_rates = tl.load(A + of_state, mask=of_channels, other=0.0)
    bias = _load_channels(delta_bias, first, left, CHANNELS, HAS_BIAS)
    skip = _load_channels(D, first, left, CHANNELS, HAS_D)
    u += sample * u_b + first.to(tl.int64) * u_d
    delta += sample * delta_b + first.to(tl.int64) * delta_d
    z += sample * z_b + first.to(tl.int64) * z_d
    grad_out += sample * out_b + first.to(tl.int64) * out_d
    grad_u += sample * gu_b + first.to(tl.int64) * gu_d
    grad_delta += sample * gdelta_b + first.to(tl.int64) * gdelta_d
    grad_z += sample * gz_b + first.to(tl.int64) * gz_d
    of_part = states[None, :, None] * adjacent + channels[None, None, :] * 0
    is_writer = (channels == 0)[None, None, :]
    of_block = ((sample * groups + group) * num_blocks + block) * num_tiles * STEPS * STATES
    if CONSTANT_B:
        B_row = tl.load(B + of_state, mask=of_channels, other=0.0)
        sum_B = tl.zeros([1, STATES, CHANNELS], tl.float32)
    else:
        B += (sample * B_groups + group * B_groups // groups) * num_tiles * STEPS * STATES
    if CONSTANT_C:
        C_row = tl.load(C + of_state, mask=of_channels, other=0.0)
        sum_C = tl.zeros([1, STATES, CHANNELS], tl.float32)
    else:
        C += (sample * C_groups + group * C_groups // groups) * num_tiles * STEPS * STATES

    BEGIN: tl.constexpr = STEPS - 1 if REVERSE else 0
    END: tl.constexpr = -1 if REVERSE else STEPS
    STRIDE: tl.constexpr = -1 if REVERSE else 1
    LAST: tl.constexpr = 0 if REVERSE else STEPS - 1
    BEFORE: tl.constexpr = STEPS if REVERSE else -1
    row = sample * num_chunks + chunk
    adjoint = tl.load(starts + row * STATES * d + of_state, mask=of_channels, other=0.0)
    sum_A = tl.zeros([1, STATES, CHANNELS], tl.float32)
    sum_D = tl.zeros([STEPS, CHANNELS], tl.float32)
    sum_bias = tl.zeros([STEPS, CHANNELS], tl.float32)
    first_tile = chunk * chunk_tiles
    count = tl.minimum(chunk_tiles, num_tiles - first_tile)
    for i in tl.range(0, count, num_stages=STAGES):
        tile = first_tile + i if REVERSE else first_tile + count - 1 - i
        start = tile.to(tl.int64) * STEPS
        inside = (start + steps < length)[:, None] & present[None, :]
        place = _checkpoint(
            sample, tile, group, block, groups, num_tiles, round_channels, adjacent, STATES, CHANNELS
        )
        state = tl.load(checkpoints + place, mask=of_channels, other=0.0)
        raw = _load_tile(delta, start, delta_l, delta_d, inside) + bias
        step_delta = _time_step(raw, inside, SOFTPLUS)
        step_u = _load_tile(u, start, u_l, u_d, inside)
        flowing_back = _load_tile(grad_out, start, out_l, out_d, inside)
        grad_y = flowing_back
        if HAS_Z:
            gate = _load_tile(z, start, z_l, z_d, inside)
            open_part = _sigmoid(gate)
            grad_y = flowing_back * gate * open_part
        deltas = _spread(step_delta, STATES)
        xs = _spread(step_delta * step_u, STATES)
        es = _spread(grad_y, STATES)

        before = tl.zeros([STEPS, STATES, CHANNELS], tl.float32)
        for j in tl.static_range(BEGIN, END, STRIDE):
            before = tl.where((steps == j)[:, None, None], state, before)
            if not CONSTANT_B:
                B_row = tl.load(B + (start + j) * STATES + states)[None, :, None]
            decay = tl.exp2(_pick(deltas, j) * decay_rates)
            state = decay * state + _pick(xs, j) * B_row

        y = tl.zeros([STEPS, CHANNELS], tl.float32)
        grad_x = tl.zeros([STEPS, CHANNELS], tl.float32)
        grad_decay = tl.zeros([STEPS, CHANNELS], tl.float32)
        for j in tl.static_range(LAST, BEFORE, -STRIDE):
            if not CONSTANT_B:
                B_row = tl.load(B + (start + j) * STATES + states)[None, :, None]
            if not CONSTANT_C:
                C_row = tl.load(C + (start + j) * STATES + states)[None, :, None]
            delta_j = _pick(deltas, j)
            x_j = _pick(xs, j)
            e_j = _pick(es, j)
            decay = tl.exp2(delta_j * decay_rates)
            through = decay * _pick(before, j)
            after = through + x_j * B_row
            grad_state = adjoint + e_j * C_row
            if CONSTANT_C:
                sum_C += after * e_j
            else:
                part = tl.broadcast_to(tl.sum(after * e_j, axis=2, keep_dims=True), [1, STATES, CHANNELS])
                tl.store(grad_C + (of_block + (start + j) * STATES) + of_part, part, mask=is_writer)
            if CONSTANT_B:
                sum_B += grad_state * x_j
            else:
                part = tl.broadcast_to(
                    tl.sum(grad_state * x_j, axis=2, keep_dims=True), [1, STATES, CHANNELS]
                )
                tl.store(grad_B + (of_block + (start + j) * STATES) + of_part, part, mask=is_writer)
            through *= grad_state
            sum_A += through * delta_j
            at_j = (steps == j)[:, None]
            grad_x = tl.where(at_j, tl.sum(grad_state * B_row, axis=1), grad_x)
            grad_decay = tl.where(at_j, tl.sum(through * decay_rates, axis=1), grad_decay)
            if HAS_Z:
                y = tl.where(at_j, tl.sum(after * C_row, axis=1), y)
            adjoint = decay * grad_state

        step_grad_u = grad_x * step_delta
        if HAS_D:
            y += skip * step_u
            step_grad_u += skip * grad_y
            sum_D += grad_y * step_u
        _store_tile(grad_u, start, gu_l, gu_d, inside, step_grad_u)
        step_grad_delta = grad_decay * _LN_2 + grad_x * step_u
        if SOFTPLUS:
            step_grad_delta *= _sigmoid(raw)
        sum_bias += tl.where(inside, step_grad_delta, 0.0)
        _store_tile(grad_delta, start, gdelta_l, gdelta_d, inside, step_grad_delta)
        if HAS_Z:
            step_grad_z = flowing_back * y * open_part * (1 + gate * (1 - open_part))
            _store_tile(grad_z, start, gz_l, gz_d, inside, step_grad_z)

    first_chunk = num_chunks - 1 if REVERSE else 0
    if chunk == first_chunk:
        tl.store(grad_first + sample * STATES * d + of_state, adjoint, mask=of_channels)
    tl.store(grad_A + row * STATES * d + of_state, sum_A, mask=of_channels)
    if CONSTANT_B:
        tl.store(grad_B + row * STATES * d + of_state, sum_B, mask=of_channels)
    if CONSTANT_C:
        tl.store(grad_C + row * STATES * d + of_state, sum_C, mask=of_channels)
    if HAS_D:
        tl.store(grad_D + row * d + first + channels, tl.sum(sum_D, axis=0), mask=present)
    if HAS_BIAS:
        tl.store(grad_bias + row * d + first + channels, tl.sum(sum_bias, axis=0), mask=present)
