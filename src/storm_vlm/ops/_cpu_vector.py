"""Vectors of 16 and 64 floats for Numba, and the arithmetic that the scan's kernels do on them.

Numba leaves vectorising to LLVM, which gives up on a recurrence. Here a vector is a value: ``vec16`` holds one number
for each of 16 channels, ``vec64`` the same for four states (state-major, 16 channels each). LLVM cuts them to the
machine's registers, on any processor. Nothing is reassociated and no fast-math flag is set: NaN and infinity behave as
in IEEE arithmetic, and results do not depend on the machine's vector width. Numbers below 2^-126 become 0 in ``exp2``.

Memory is named by address (an integer), in bytes.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

from storm_vlm.ops._cpu_layout import LANES, STATES

F32, I32 = ir.FloatType(), ir.IntType(32)

inline = njit(forceinline=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


class VectorType(types.Type):
    """Numba type of a vector of floats."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(name=f"float32x{width}")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    """A vector is one LLVM value."""

    def __init__(self, data_model_manager: Any, numba_type: VectorType) -> None:
        super().__init__(data_model_manager, numba_type, ir.VectorType(F32, numba_type.width))


vec16, vec64 = VectorType(LANES), VectorType(LANES * STATES)


class _Arithmetic(AbstractTemplate):
    """Vector with vector of the same width, or with a number."""

    def generic(self, args: tuple[types.Type, ...], kws: dict[str, Any]) -> Any:
        """Types one operation."""
        vectors = [a for a in args if isinstance(a, VectorType)]
        if not vectors or any(not isinstance(a, VectorType | types.Float) for a in args):
            return None
        return signature(vectors[0], *args)


for _operation, _build in {
    operator.add: ir.IRBuilder.fadd,
    operator.sub: ir.IRBuilder.fsub,
    operator.mul: ir.IRBuilder.fmul,
    operator.truediv: ir.IRBuilder.fdiv,
}.items():
    infer_global(_operation)(type("_VectorArithmetic", (_Arithmetic,), {"key": _operation}))

    def _lower(context: Any, builder: Any, sig: Any, args: Any, build: Callable[..., Any] = _build) -> Any:
        left, right = _same_type(builder, sig, args)
        return build(builder, left, right)

    for _left, _right in ((VectorType, VectorType), (VectorType, types.Float), (types.Float, VectorType)):
        lower_builtin(_operation, _left, _right)(_lower)


def _same_type(builder: Any, sig: Any, args: Any) -> list[Any]:
    """Spreads the numbers among the operands over all lanes."""
    width = sig.return_type.width
    return [
        value
        if isinstance(kind, VectorType)
        else _splat(builder, builder.fptrunc(value, F32), width)
        if kind is types.float64
        else _splat(builder, value, width)
        for kind, value in zip(sig.args, args, strict=True)
    ]


def mask_of(indices: Any) -> ir.Constant:
    indices = list(indices)
    return ir.Constant(ir.VectorType(I32, len(indices)), indices)


def _splat(builder: Any, value: Any, width: int) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, width), ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, undefined, mask_of([0] * width))


def constant_of(element: Any, value: float, width: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, width), [value] * width)


def pointer_to(builder: Any, address: Any, target: Any) -> Any:
    return builder.inttoptr(address, target.as_pointer())


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    # Fused where the machine has the instruction, two instructions elsewhere: never a library call.
    name = f"llvm.fmuladd.v{a.type.count}f32"
    kind = ir.FunctionType(a.type, [a.type] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


def _quarters(builder: Any, vector: Any) -> list[Any]:
    return [
        builder.shuffle_vector(vector, vector, mask_of(range(LANES * i, LANES * (i + 1))))
        for i in range(STATES)
    ]


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """Returns ``a b + c``, rounded once where the machine can."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _fma(builder, *_same_type(builder, sig, args))

    vectors = [kind for kind in (a, b, c) if isinstance(kind, VectorType)]
    return vectors[0](a, b, c), build


@intrinsic
def larger(typingctx: Any, bound: Any, x: Any) -> Any:
    """Returns ``x`` where it is not below the bound; NaN stays NaN."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bound, x = _same_type(builder, sig, args)
        return builder.select(builder.fcmp_ordered(">", bound, x), bound, x)

    return x(bound, x), build


@intrinsic
def smaller(typingctx: Any, bound: Any, x: Any) -> Any:
    """Returns ``x`` where it is not above the bound; NaN stays NaN."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bound, x = _same_type(builder, sig, args)
        return builder.select(builder.fcmp_ordered("<", bound, x), bound, x)

    return x(bound, x), build


def _loader(vector: VectorType) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            pointer = pointer_to(builder, args[0], ir.VectorType(F32, vector.width))
            return builder.load(pointer, align=4)

        return vector(types.int64), build

    return load


load16, load64 = _loader(vec16), _loader(vec64)


@intrinsic
def zeros64(typingctx: Any) -> Any:
    """Returns zeros."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return constant_of(F32, 0.0, LANES * STATES)

    return vec64(), build


@intrinsic
def store(typingctx: Any, address: Any, vector: Any) -> Any:
    """Writes a vector."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[1], pointer_to(builder, args[0], args[1].type), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, vector), build


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Asks for a cache line that will be read or written soon; any address is allowed."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # To read, into the second-level cache, data.
        builder.call(function, [builder.inttoptr(args[0], byte), *(ir.Constant(I32, i) for i in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(types.int64), build


@intrinsic
def integer(typingctx: Any, address: Any) -> Any:
    """Reads a 64-bit integer."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(pointer_to(builder, args[0], ir.IntType(64)), align=8)

    return types.int64(types.int64), build


@intrinsic
def call_kernel(typingctx: Any, address: Any, a: Any, b: Any, c: Any, d: Any, e: Any) -> Any:
    """Calls the C function at an address with five integers."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        integer = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [integer] * 5)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), build


@intrinsic
def call_integer(typingctx: Any, address: Any) -> Any:
    """Calls the C function at an address, which takes nothing and returns an int."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(I32, [])
        result = builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])
        return builder.sext(result, ir.IntType(64))

    return types.int64(types.int64), build


@intrinsic
def spread(typingctx: Any, address: Any) -> Any:
    """Reads four floats, one for each state, and spreads each over the 16 channels."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = pointer_to(builder, args[0], F32)
        rows = [
            _splat(builder, builder.load(builder.gep(pointer, [ir.Constant(I32, i)]), align=4), LANES)
            for i in range(STATES)
        ]
        pairs = [builder.shuffle_vector(rows[i], rows[i + 1], mask_of(range(2 * LANES))) for i in (0, 2)]
        return builder.shuffle_vector(*pairs, mask_of(range(4 * LANES)))

    return vec64(types.int64), build


@intrinsic
def repeat(typingctx: Any, row: Any) -> Any:
    """Gives each of the four states the same row of channels."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.shuffle_vector(args[0], args[0], mask_of(list(range(LANES)) * STATES))

    return vec64(vec16), build


@intrinsic
def add_dot(typingctx: Any, total: Any, a: Any, b: Any) -> Any:
    """Adds the sum over the four states of ``a b`` to a row."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b = (_quarters(builder, vector) for vector in args[1:])
        first = _fma(builder, a[1], b[1], _fma(builder, a[0], b[0], args[0]))
        second = _fma(builder, a[3], b[3], builder.fmul(a[2], b[2]))
        return builder.fadd(first, second)

    return vec16(vec16, vec64, vec64), build


@intrinsic
def _exponent_scale(typingctx: Any, shifted: Any) -> Any:
    """Returns 2^k of ``k + 1.5 * 2^23 + 127``: the low byte becomes the exponent."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        width = sig.return_type.width
        bits = builder.bitcast(args[0], ir.VectorType(I32, width))
        return builder.bitcast(builder.shl(bits, constant_of(I32, 23, width)), args[0].type)

    return shifted(shifted), build


_ROUND = 1.5 * 2.0**23 + 127.0


@inline
def exp2(x: Any) -> Any:
    """2^x to 1e-7: 2^round(x) times a polynomial that is exact at 0, fitted to least largest error (ours)."""
    x = larger(-127.0, smaller(128.0, x))
    shifted = x + _ROUND
    r = x - (shifted - _ROUND)
    p = fma(r, 0.0001535336181225002, 0.0013398874445338521)
    p = fma(r, p, 0.00961843735830693)
    p = fma(r, p, 0.05550332471027039)
    p = fma(r, p, 0.2402264791361956)
    p = fma(r, p, 0.6931472028551298)
    return fma(r, p, 1.0) * _exponent_scale(shifted)


@inline
def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x)."""
    return 1.0 / (exp2(x * -1.4426950408889634) + 1.0)


@inline
def softplus(x: Any) -> Any:
    """log(1 + e^x) as max(x, 0) + log1p(e^-|x|), with log1p(v) = 2 artanh(v / (2 + v)) as a polynomial (ours)."""
    positive = larger(0.0, x)
    v = exp2(smaller(x * -1.0, x) * 1.4426950408889634)
    s = v / (v + 2.0)
    q = s * s
    p = fma(q, 0.28178334399524113, 0.27960602867145046)
    p = fma(q, p, 0.40024910274273107)
    p = fma(q, p, 0.6666631468215598)
    p = fma(q, p, 2.000000007921038)
    return fma(s, p, positive)
