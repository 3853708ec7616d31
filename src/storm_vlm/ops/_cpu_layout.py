"""What the CPU kernels work on, and where it lies in memory.

The kernels take one array of integers, the descriptor: the planes, then the fields of `Problem`. A tile is 16 channels
that share B and C; a slab is up to `SLAB_TILES` tiles of one group; a chunk is `CHUNK_STEPS` steps. Tables are float32:
a tile's states are ``(n, 16)`` with n padded to a multiple of four; scratch rows are ``(step, 16)``.
"""

from typing import NamedTuple

import numpy as np

from storm_vlm.ops._cpu_vector import BLOCK_BYTES, LANES, ROW_BYTES, inline, integers

CHUNK_STEPS = 16
SLAB_TILES = 4
# Each plane has the scratch row of its number; those before `out` are read, the others written, where there are any.
# `ungated` is what a gate takes besides this scan: in the forward pass the output of scans before it, which is added; in
# the backward pass the sum that was gated. `total` is that sum.
PLANES = (
    "u",
    "delta",
    "z",
    "grad_out",
    "ungated",
    "out",
    "grad_u",
    "grad_delta",
    "grad_z",
    "total",
    "grad_ungated",
)
FIRST_WRITTEN = PLANES.index("out")
_PLANE_FIELDS = 5
TILE_BYTES = CHUNK_STEPS * ROW_BYTES


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
    has_ungated: int
    has_total: int
    B: Weights
    C: Weights
    length: int
    groups: int
    group_channels: int
    states: int
    softplus: int
    reverse: int
    # Tables of the states or the channels of all tiles.
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
    # delta as a product: (b, chunk, rank, 16 steps) times (tile, rank, 16); rank 0 where it is a plane.
    rank: int
    low_rank: int
    delta_weight: int


# B and C count as four integers each.
NUM_DESCRIBED = len(PLANES) * _PLANE_FIELDS + len(Problem._fields) + 2 * (len(Weights._fields) - 1)


class Tile(NamedTuple):
    """Where a tile lies."""

    batch: int
    number: int  # among all tiles
    group: int
    slab: int  # among the slabs of its group
    opens_slab: bool
    closes_slab: bool
    channel: int
    channels: int  # 16, or what is left of the group


class Rows(NamedTuple):
    """Addresses of scratch: ``(step, 16)`` rows, first those of the planes, then ``(step, 64)`` blocks."""

    u: int
    raw: int  # delta with its bias, before softplus
    z: int
    grad_out: int
    ungated: int
    y: int
    grad_x: int
    grad_decay: int  # gradient of delta through the decay, over ln 2
    grad_z: int
    total: int
    grad_y: int
    delta: int
    x: int
    decay: int
    before: int  # one more block than steps: the state after the chunk
    grad_B: int  # (step, n, 16), summed over the tiles of a slab
    grad_C: int


NUM_ROWS = 13


def scratch_bytes(states: int) -> int:
    """Returns the scratch memory that a kernel needs, with room to align it to 64 bytes."""
    return (NUM_ROWS + 2 * states) * TILE_BYTES + (2 * CHUNK_STEPS + 1) * BLOCK_BYTES + ROW_BYTES


@inline
def scratch_rows(scratch: int, states: int) -> Rows:
    blocks = scratch + NUM_ROWS * TILE_BYTES
    sums = blocks + (2 * CHUNK_STEPS + 1) * BLOCK_BYTES
    return Rows(
        scratch, scratch + TILE_BYTES, scratch + 2 * TILE_BYTES, scratch + 3 * TILE_BYTES,
        scratch + 4 * TILE_BYTES, scratch + 5 * TILE_BYTES, scratch + 6 * TILE_BYTES, scratch + 7 * TILE_BYTES,
        scratch + 8 * TILE_BYTES, scratch + 9 * TILE_BYTES, scratch + 10 * TILE_BYTES, scratch + 11 * TILE_BYTES,
        scratch + 12 * TILE_BYTES,
        blocks, blocks + CHUNK_STEPS * BLOCK_BYTES, sums, sums + states * TILE_BYTES,
    )  # fmt: skip


@inline
def plane_of(d: np.ndarray, number: int) -> Plane:
    """Reads a plane from the beginning of the descriptor."""
    i = number * _PLANE_FIELDS
    return Plane(d[i], d[i + 1], d[i + 2], d[i + 3], d[i + 4])


@inline
def described(descriptor: int) -> np.ndarray:
    """Returns the descriptor at an address."""
    return integers(descriptor, NUM_DESCRIBED)


@inline
def problem_of(d: np.ndarray) -> Problem:
    """Reads the fields of `Problem`, flattened, that follow the planes in the descriptor."""
    i = len(PLANES) * _PLANE_FIELDS
    return Problem(
        d[i], d[i + 1], d[i + 2],
        Weights(d[i + 3], d[i + 4], d[i + 5], d[i + 6]), Weights(d[i + 7], d[i + 8], d[i + 9], d[i + 10]),
        d[i + 11], d[i + 12], d[i + 13], d[i + 14], d[i + 15], d[i + 16], d[i + 17], d[i + 18], d[i + 19],
        d[i + 20], d[i + 21], d[i + 22], d[i + 23], d[i + 24], d[i + 25], d[i + 26], d[i + 27], d[i + 28],
        d[i + 29], d[i + 30],
    )  # fmt: skip


@inline
def group_tiles_of(problem: Problem) -> int:
    return (problem.group_channels + LANES - 1) // LANES


@inline
def locate(problem: Problem, batch: int, index: int) -> Tile:
    """Returns the tile with this number."""
    group_tiles = group_tiles_of(problem)
    group, place = divmod(index, group_tiles)
    return Tile(
        batch, index, group, place // SLAB_TILES,
        place % SLAB_TILES == 0, place % SLAB_TILES == SLAB_TILES - 1 or place == group_tiles - 1,
        group * problem.group_channels + place * LANES,
        min(LANES, problem.group_channels - place * LANES),
    )  # fmt: skip


@inline
def next_tile(
    problem: Problem, tile: Tile, first: int, end: int, start: int, is_forward: bool
) -> tuple[Tile, int]:
    """Returns the tile that comes next and the first step of its chunk."""
    index, following = tile.number + 1, start
    if index == end:
        index = first
        following += CHUNK_STEPS if is_forward != problem.reverse else -CHUNK_STEPS
    return locate(problem, tile.batch, index), following


@inline
def tile_offset(problem: Problem, tile: Tile, row_bytes: int) -> int:
    """Returns the offset of a tile in a table of ``(b, tile, row)``."""
    return (tile.batch * problem.groups * group_tiles_of(problem) + tile.number) * row_bytes


@inline
def checkpoint_address(problem: Problem, tile: Tile, chunks: int, chunk: int) -> int:
    """Returns the address of the state before a chunk."""
    tiles = problem.groups * group_tiles_of(problem)
    place = (tile.batch * chunks + chunk) * tiles + tile.number
    return problem.checkpoints + place * problem.states * ROW_BYTES


@inline
def weights_address(weights: Weights, tile: Tile, states: int, start: int) -> int:
    """Returns the address of B or C at a step for the first four states."""
    if weights.step == 0:
        return weights.address + tile.number * states * ROW_BYTES
    return weights.address + tile.batch * weights.batch + tile.group * weights.group + start * weights.step
