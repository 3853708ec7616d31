"""Elements in memory, one or a row of 16: float32, bfloat16 and float16, read as float32; and squares of 16 rows."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from storm_vlm.ops._cpu_layout import BFLOAT16, FLOAT16, FLOAT32, LANES, STATES
from storm_vlm.ops._cpu_vector import (
    F32,
    I32,
    constant_of,
    inline,
    load16,
    load64,
    mask_of,
    pointer_to,
    store,
    vec16,
    vec64,
)

I16, F16 = ir.IntType(16), ir.HalfType()

# What one element, a row of 16 and a block of 64 are in the kernels.
_BLOCK = STATES * LANES
_VALUES = {None: types.float32, LANES: vec16, _BLOCK: vec64}


def _widen(builder: Any, value: Any, code: int, width: int | None) -> Any:
    """Converts what memory holds to float32; ``width`` is None for one element."""

    def of(element: Any) -> Any:
        return element if width is None else ir.VectorType(element, width)

    if code == FLOAT16:
        return builder.fpext(value, of(F32))
    shift = ir.Constant(I32, 16) if width is None else constant_of(I32, 16, width)
    return builder.bitcast(builder.shl(builder.zext(value, of(I32)), shift), of(F32))


def _narrow(builder: Any, value: Any, code: int, width: int | None) -> Any:
    """Rounds float32 to nearest, ties to even, for memory."""

    def of(element: Any) -> Any:
        return element if width is None else ir.VectorType(element, width)

    def constant(number: int) -> Any:
        return ir.Constant(I32, number) if width is None else constant_of(I32, number, width)

    if code == FLOAT16:
        return builder.fptrunc(value, of(F16))
    bits = builder.bitcast(value, of(I32))
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", value, value)
    quiet = builder.or_(bits, constant(0x400000))
    chosen = builder.select(is_nan, quiet, rounded)
    return builder.trunc(builder.lshr(chosen, constant(16)), of(I16))


def _element_reader(code: int, width: int | None) -> Any:
    element = {FLOAT32: F32, BFLOAT16: I16, FLOAT16: F16}[code]
    align = 4 if code == FLOAT32 else 2

    @intrinsic
    def read(typingctx: Any, address: Any) -> Any:
        def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            kind = element if width is None else ir.VectorType(element, width)
            value = builder.load(pointer_to(builder, args[0], kind), align=align)
            return value if code == FLOAT32 else _widen(builder, value, code, width)

        return _VALUES[width](types.int64), build

    return read


def _element_writer(code: int, width: int | None) -> Any:
    align = 4 if code == FLOAT32 else 2

    @intrinsic
    def write(typingctx: Any, address: Any, value: Any) -> Any:
        def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            stored = args[1] if code == FLOAT32 else _narrow(builder, args[1], code, width)
            builder.store(stored, pointer_to(builder, args[0], stored.type), align=align)
            return context.get_dummy_value()

        return types.void(types.int64, _VALUES[width]), build

    return write


_read_f32, _read_bf16, _read_f16 = (_element_reader(code, None) for code in (FLOAT32, BFLOAT16, FLOAT16))
_read16_bf16, _read16_f16 = (_element_reader(code, LANES) for code in (BFLOAT16, FLOAT16))
_read64_bf16, _read64_f16 = (_element_reader(code, _BLOCK) for code in (BFLOAT16, FLOAT16))
_write_f32, _write_bf16, _write_f16 = (_element_writer(code, None) for code in (FLOAT32, BFLOAT16, FLOAT16))
_write16_bf16, _write16_f16 = (_element_writer(code, LANES) for code in (BFLOAT16, FLOAT16))
_write64_bf16, _write64_f16 = (_element_writer(code, _BLOCK) for code in (BFLOAT16, FLOAT16))


@inline
def read_one(address: int, dtype: int) -> Any:
    """Reads one element as float32."""
    if dtype == FLOAT32:
        return _read_f32(address)
    if dtype == BFLOAT16:
        return _read_bf16(address)
    return _read_f16(address)


@inline
def read_row(address: int, dtype: int) -> Any:
    """Reads 16 adjacent elements as float32."""
    if dtype == FLOAT32:
        return load16(address)
    if dtype == BFLOAT16:
        return _read16_bf16(address)
    return _read16_f16(address)


@inline
def write_one(address: int, dtype: int, value: Any) -> None:
    """Writes one float32 as an element."""
    if dtype == FLOAT32:
        _write_f32(address, value)
    elif dtype == BFLOAT16:
        _write_bf16(address, value)
    else:
        _write_f16(address, value)


@inline
def write_row(address: int, dtype: int, row: Any) -> None:
    """Writes 16 adjacent elements."""
    if dtype == FLOAT32:
        store(address, row)
    elif dtype == BFLOAT16:
        _write16_bf16(address, row)
    else:
        _write16_f16(address, row)


@inline
def read_block(address: int, dtype: int) -> Any:
    """Reads 64 adjacent elements as float32."""
    if dtype == FLOAT32:
        return load64(address)
    if dtype == BFLOAT16:
        return _read64_bf16(address)
    return _read64_f16(address)


@inline
def write_block(address: int, dtype: int, block: Any) -> None:
    """Writes 64 adjacent elements."""
    if dtype == FLOAT32:
        store(address, block)
    elif dtype == BFLOAT16:
        _write64_bf16(address, block)
    else:
        _write64_f16(address, block)


@intrinsic
def transpose_square(typingctx: Any, address: Any) -> Any:
    """Transposes 16 rows of 16 floats in place, by four rounds of interleaving row i with row i + 8."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        row = ir.VectorType(F32, LANES)
        pointer = pointer_to(builder, args[0], row)
        places = [builder.gep(pointer, [ir.Constant(I32, i)]) for i in range(LANES)]
        rows = [builder.load(place, align=4) for place in places]
        half = LANES // 2
        low = mask_of([i // 2 + LANES * (i % 2) for i in range(LANES)])
        high = mask_of([half + i // 2 + LANES * (i % 2) for i in range(LANES)])
        for _ in range(4):
            pairs = [(rows[i], rows[i + half]) for i in range(half)]
            rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in (low, high)]
        for place, value in zip(places, rows, strict=True):
            builder.store(value, place, align=4)
        return context.get_dummy_value()

    return types.void(types.int64), build


@intrinsic
def sum_rows(typingctx: Any, address: Any) -> Any:
    """Returns the sums of 16 rows of 16 floats, by halves: lane i is the sum of row i."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = pointer_to(builder, args[0], ir.VectorType(F32, LANES))
        rows = [builder.load(builder.gep(pointer, [ir.Constant(I32, i)]), align=4) for i in range(LANES)]
        # A vector holds 16 / width rows, each still spread over `width` lanes; a round halves the width.
        width = LANES
        while len(rows) > 1:
            half, rounds = width // 2, []
            kept = [lane for lane in range(2 * LANES) if lane % width < half]
            for a, b in zip(rows[::2], rows[1::2], strict=True):
                left = builder.shuffle_vector(a, b, mask_of(kept))
                right = builder.shuffle_vector(a, b, mask_of(lane + half for lane in kept))
                rounds.append(builder.fadd(left, right))
            rows, width = rounds, half
        return rows[0]

    return vec16(types.int64), build
