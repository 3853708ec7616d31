"""What the CPU kernels work on, and where it lies in memory.

The kernels take one array of integers, the descriptor: the planes, then the fields of `Problem`. A tile is 16 channels
that share B and C; a slab is up to `SLAB_TILES` tiles of one group; a chunk is `CHUNK_STEPS` steps. Tables are float32:
a tile's states are ``(n, 16)`` with n padded to a multiple of four; scratch rows are ``(step, 16)``.
"""

from typing import NamedTuple

# A vector holds 16 channels, or the same for four states or steps.
LANES = 16
STATES = 4
ROW_BYTES = 4 * LANES
BLOCK_BYTES = STATES * ROW_BYTES
# Elements in memory: the float32 of the kernels, bfloat16 as the upper half of a float32, IEEE float16.
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
CHANNELS = STATES * LANES  # of a block of the convolution
NUM_CONVOLUTION_PLANES = 5
GROUP_STEPS = 8  # of the convolution's gradient
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
PLANE_INTEGERS = 5
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


class Convolution(NamedTuple):
    """What the kernels of the convolution work on; channels are adjacent in all planes."""

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
    ring: int  # rows of the ring of recent gradients, a power of two
    # Tables with the channels padded to whole blocks.
    weight: int  # (k, d), in the order of the rows
    bias: int  # (d,)
    grad_weight: int  # (b, k, d)
    grad_bias: int  # (b, d)


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
