"""Where the tiles of a scan lie in memory, for its compiled kernels; the layout is that of `_cpu_layout`."""

from storm_vlm.ops._cpu_layout import (
    BLOCK_BYTES,
    CHUNK_STEPS,
    LANES,
    NUM_ROWS,
    PLANE_INTEGERS,
    PLANES,
    ROW_BYTES,
    SLAB_TILES,
    TILE_BYTES,
    Plane,
    Problem,
    Rows,
    Tile,
    Weights,
)
from storm_vlm.ops._cpu_vector import inline, integer


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
def plane_of(descriptor: int, number: int) -> Plane:
    """Reads a plane from the beginning of the descriptor."""
    d = descriptor + 8 * number * PLANE_INTEGERS
    return Plane(integer(d), integer(d + 8), integer(d + 16), integer(d + 24), integer(d + 32))


@inline
def _weights_of(d: int) -> Weights:
    return Weights(integer(d), integer(d + 8), integer(d + 16), integer(d + 24))


@inline
def problem_of(descriptor: int) -> Problem:
    """Reads the fields of `Problem`, flattened, that follow the planes in the descriptor."""
    d = descriptor + 8 * len(PLANES) * PLANE_INTEGERS
    e = d + 8 * 11
    return Problem(
        integer(d), integer(d + 8), integer(d + 16), _weights_of(d + 24), _weights_of(d + 56),
        integer(e), integer(e + 8), integer(e + 16), integer(e + 24), integer(e + 32), integer(e + 40),
        integer(e + 48), integer(e + 56), integer(e + 64), integer(e + 72), integer(e + 80), integer(e + 88),
        integer(e + 96), integer(e + 104), integer(e + 112), integer(e + 120), integer(e + 128), integer(e + 136),
        integer(e + 144), integer(e + 152),
    )  # fmt: skip


@inline
def group_tiles_of(problem: Problem) -> int:
    return (problem.group_channels + LANES - 1) // LANES


@inline
def locate(problem: Problem, batch: int, index: int) -> Tile:
    """Returns the tile with this number."""
    group_tiles = group_tiles_of(problem)
    group, place = index // group_tiles, index % group_tiles
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
