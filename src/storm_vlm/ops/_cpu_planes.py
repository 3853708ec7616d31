"""Brings tiles of strided ``(b, d, l)`` tensors of any of the kernels' dtypes into scratch rows, and back."""

from numba import types

from storm_vlm.ops._cpu_elements import read_one, read_row, transpose_square, write_one, write_row
from storm_vlm.ops._cpu_layout import (
    CHUNK_STEPS,
    FIRST_WRITTEN,
    FLOAT32,
    LANES,
    PLANES,
    ROW_BYTES,
    TILE_BYTES,
    Plane,
    Tile,
)
from storm_vlm.ops._cpu_places import plane_of
from storm_vlm.ops._cpu_vector import inline, load16, prefetch, store


@inline
def read_planes(descriptor: int, tile: Tile, start: int, steps: int, scratch: int) -> None:
    for number in range(FIRST_WRITTEN):
        plane = plane_of(descriptor, number)
        if plane.address:
            _read_tile(plane, tile, start, steps, scratch + number * TILE_BYTES)


@inline
def write_planes(descriptor: int, tile: Tile, start: int, steps: int, scratch: int) -> None:
    for number in range(FIRST_WRITTEN, len(PLANES)):
        plane = plane_of(descriptor, number)
        if plane.address:
            _write_tile(plane, tile, start, steps, scratch + number * TILE_BYTES)


@inline
def prefetch_planes(descriptor: int, tile: Tile, start: int) -> None:
    for number in range(len(PLANES)):
        plane = plane_of(descriptor, number)
        if plane.address:
            _prefetch_tile(plane, tile, start, CHUNK_STEPS)


@inline
def _read_tile(plane: Plane, tile: Tile, start: int, steps: int, rows: int) -> None:
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
def _write_tile(plane: Plane, tile: Tile, start: int, steps: int, rows: int) -> None:
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
def _prefetch_tile(plane: Plane, tile: Tile, start: int, steps: int) -> None:
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
