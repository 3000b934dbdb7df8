"""The few vector operations that Numba's own loops do not compile well: inner loops written in LLVM IR.

Numba has no vector type, and LLVM cannot keep an array accumulator in registers when it may alias an input. So the
inner loops of attention and of the sparse feed-forward are intrinsics over 16-lane vectors (one AVX-512 register; LLVM
splits them on narrower machines). Weights and cached keys and values are float32, or bfloat16 seen as uint16: a
bfloat16 is the upper half of a float32, so widening is a shift.

Every function adds its terms in one fixed order that depends on the sizes alone. That makes a result independent of
batch-mates and threads.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.cpu.isa import has_avx512
from engine.kernels.cpu.options import OPTIONS

LANES = 16
_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_CONTRACT = ("contract",)  # allow fused multiply-add, nothing that reorders sums

# The exponential of `math.exp` and `exponential`: Cephes' polynomial.
LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693359375)  # few bits, so that n * LN2_HIGH is exact
LN2_LOW = np.float32(-2.12194440e-4)
EXP_TERMS = tuple(
    np.float32(term)
    for term in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
)
MIN_EXPONENT = np.float32(-87.0)


@intrinsic
def bits_to_float(typingctx: Any, bits: Any) -> Any:
    """Reinterpret 32 bits as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _FLOAT)

    return types.float32(types.uint32), codegen


@intrinsic
def float_to_bits(typingctx: Any, value: Any) -> Any:
    """Reinterpret a float32 as 32 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


# For code generators, here and in the modules beside this one.


def alternate(lanes: int) -> list[list[int]]:
    """Two orders of two vectors a and b, in each four of lanes a0 b0 a1 b1, and a2 b2 a3 b3."""
    return [[four + k for four in range(0, lanes, 4) for k in (i, lanes + i, i + 1, lanes + i + 1)] for i in (0, 2)]


def pair_up(lanes: int) -> list[list[int]]:
    """Two orders of two vectors a and b, in each four of lanes a0 a1 b0 b1, and a2 a3 b2 b3."""
    return [[four + k for four in range(0, lanes, 4) for k in (i, i + 1, lanes + i, lanes + i + 1)] for i in (0, 2)]


def element_pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    """Address of element `offset` of a contiguous array."""
    return builder.gep(context.make_array(array_type)(context, builder, value=array).data, [offset])


def advance(builder: Any, pointer: Any, *offsets: Any) -> Any:
    """An address so many elements further on: integers of Python or of 64 bits."""
    for offset in offsets:
        step = ir.Constant(ir.IntType(64), offset) if isinstance(offset, int) else offset
        pointer = builder.gep(pointer, [step])
    return pointer


def times(builder: Any, value: Any, factor: int) -> Any:
    """A multiple of an integer of 64 bits."""
    return builder.mul(value, ir.Constant(ir.IntType(64), factor))


def load_as(builder: Any, pointer: Any, kind: Any, align: int = 4) -> Any:
    """Load a value of an LLVM type from wherever it lies."""
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=align)


def store_as(builder: Any, value: Any, pointer: Any, align: int = 4) -> None:
    """Store a value, whatever the pointer's type is."""
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)


def load_vector(builder: Any, pointer: Any, dtype: Any, lanes: int = LANES) -> Any:
    """Load consecutive float32 or bfloat16 values as float32."""
    kind = ir.VectorType(_FLOAT, lanes)
    if dtype == types.float32:
        return load_as(builder, pointer, kind)
    bits = load_as(builder, pointer, ir.VectorType(ir.IntType(16), lanes), align=2)
    wide = builder.zext(bits, ir.VectorType(ir.IntType(32), lanes))
    shift = ir.Constant(wide.type, [16] * lanes)
    return builder.bitcast(builder.shl(wide, shift), kind)


def prefetch_line(builder: Any, pointer: Any) -> None:
    """Fetch the cache line of an address into the second-level cache."""
    address, integer = builder.bitcast(pointer, ir.IntType(8).as_pointer()), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [address.type, integer, integer, integer])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [address, *(ir.Constant(integer, flag) for flag in (0, 2, 1))])


def _floats(value: Any) -> Any:
    return ir.Constant(_VECTOR, [float(value)] * LANES)


def splat(builder: Any, scalar: Any, lanes: int = LANES) -> Any:
    """A vector of so many times the same float32."""
    undefined = ir.Constant(ir.VectorType(_FLOAT, lanes), ir.Undefined)
    single = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(single, undefined, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, fused where the processor can."""
    return builder.fadd(builder.fmul(a, b, flags=_CONTRACT), c, flags=_CONTRACT)


def _is_weight(dtype: Any) -> bool:
    return dtype in (types.float32, types.uint16)


def _transposed_dots16(heads: int) -> Any:
    partials = 2  # sums of one head in turn, whatever the number of heads: how they are shared out changes no bits

    @intrinsic
    def transposed_dots16(
        typingctx: Any,
        out: Any,
        out_at: Any,
        out_stride: Any,
        query: Any,
        query_at: Any,
        keys: Any,
        keys_at: Any,
        size: Any,
    ) -> Any:
        assert _is_weight(keys.dtype)
        signature = types.void(out, types.intp, types.intp, query, types.intp, keys, types.intp, types.intp)
        key_dtype = keys.dtype

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out_type, _, _, query_type, _, keys_type, _, _ = signature.args
            out_pointer = element_pointer(context, builder, out_type, args[0], args[1])
            query_pointer = element_pointer(context, builder, query_type, args[3], args[4])
            keys_pointer = element_pointer(context, builder, keys_type, args[5], args[6])
            size = args[7]
            queries = [builder.gep(query_pointer, [builder.mul(size, ir.Constant(size.type, h))]) for h in range(heads)]
            sums = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(partials)] for _ in queries]
            for total in (total for line in sums for total in line):
                builder.store(ir.Constant(_VECTOR, [0.0] * LANES), total)
            turns = ir.Constant(size.type, partials)
            with cgutils.for_range(builder, builder.udiv(size, turns)) as loop:
                base = builder.mul(loop.index, turns)
                for turn in range(partials):
                    d = builder.add(base, ir.Constant(base.type, turn))
                    at = builder.mul(d, ir.Constant(d.type, LANES))
                    row = load_vector(builder, builder.gep(keys_pointer, [at]), key_dtype)
                    for head, line in zip(queries, sums, strict=True):
                        factor = splat(builder, builder.load(builder.gep(head, [d])))
                        builder.store(multiply_add(builder, factor, row, builder.load(line[turn])), line[turn])
            for h, line in enumerate(sums):
                totals = [builder.load(total) for total in line]
                while len(totals) > 1:
                    totals = [builder.fadd(a, b) for a, b in zip(totals[::2], totals[1::2], strict=True)]
                place = builder.mul(args[2], ir.Constant(size.type, h))
                store_as(builder, totals[0], builder.gep(out_pointer, [place]))
            return context.get_dummy_value()

        return signature, codegen

    return transposed_dots16


def _weighted_rows16(heads: int) -> Any:
    @intrinsic
    def weighted_rows16(
        typingctx: Any,
        out: Any,
        out_at: Any,
        out_stride: Any,
        weights: Any,
        weights_at: Any,
        weights_stride: Any,
        rows: Any,
        rows_at: Any,
        stride: Any,
        count: Any,
    ) -> Any:
        assert _is_weight(rows.dtype)
        place = types.intp
        signature = types.void(out, place, place, weights, place, place, rows, place, place, place)
        row_dtype = rows.dtype

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out_pointer = element_pointer(context, builder, signature.args[0], args[0], args[1])
            weights_pointer = element_pointer(context, builder, signature.args[3], args[3], args[4])
            rows_pointer = element_pointer(context, builder, signature.args[6], args[6], args[7])

            def apart(pointer: Any, stride: Any) -> list[Any]:
                return [builder.gep(pointer, [builder.mul(stride, ir.Constant(stride.type, h))]) for h in range(heads)]

            targets, factors = apart(out_pointer, args[2]), apart(weights_pointer, args[5])
            totals = [cgutils.alloca_once(builder, _VECTOR) for _ in targets]
            for target, total in zip(targets, totals, strict=True):
                builder.store(load_vector(builder, target, types.float32), total)
            with cgutils.for_range(builder, args[9]) as loop:
                at = builder.mul(loop.index, args[8])
                row = load_vector(builder, builder.gep(rows_pointer, [at]), row_dtype)
                for factor, total in zip(factors, totals, strict=True):
                    weight = splat(builder, builder.load(builder.gep(factor, [loop.index])))
                    builder.store(multiply_add(builder, weight, row, builder.load(total)), total)
            for target, total in zip(targets, totals, strict=True):
                store_as(builder, builder.load(total), target)
            return context.get_dummy_value()

        return signature, codegen

    return weighted_rows16


# For 1 to 4 query heads that share keys and values, which are widened once for all of them.
_DOTS_1, _DOTS_2, _DOTS_3, _DOTS_4 = (_transposed_dots16(heads) for heads in range(1, 5))
_ROWS_1, _ROWS_2, _ROWS_3, _ROWS_4 = (_weighted_rows16(heads) for heads in range(1, 5))
HEADS = 4 if has_avx512() else 3  # at most: their sums stay in registers


@njit(**OPTIONS)
def transposed_dots16(heads, out, out_at, out_stride, query, query_at, keys, keys_at, size):  # type: ignore[no-untyped-def]
    """out[out_at + h * out_stride + t] = sum over d of query[query_at + h * size + d] * keys[keys_at + 16 d + t].

    For h < heads <= 4, t < 16 and d < size. `size` is a multiple of 4.
    """
    if heads == 1:
        _DOTS_1(out, out_at, out_stride, query, query_at, keys, keys_at, size)
    elif heads == 2:
        _DOTS_2(out, out_at, out_stride, query, query_at, keys, keys_at, size)
    elif heads == 3:
        _DOTS_3(out, out_at, out_stride, query, query_at, keys, keys_at, size)
    else:
        _DOTS_4(out, out_at, out_stride, query, query_at, keys, keys_at, size)


@njit(**OPTIONS)
def weighted_rows16(heads, out, out_at, out_stride, weights, weights_at, weights_stride, rows, rows_at, stride, count):  # type: ignore[no-untyped-def]
    """out[out_at + h * out_stride + d] += sum over t of weights[weights_at + h * weights_stride + t] * rows[t, d].

    For h < heads <= 4, t < count and d < 16; rows[t, d] is rows[rows_at + t * stride + d].
    """
    if heads == 1:
        _ROWS_1(out, out_at, out_stride, weights, weights_at, weights_stride, rows, rows_at, stride, count)
    elif heads == 2:
        _ROWS_2(out, out_at, out_stride, weights, weights_at, weights_stride, rows, rows_at, stride, count)
    elif heads == 3:
        _ROWS_3(out, out_at, out_stride, weights, weights_at, weights_stride, rows, rows_at, stride, count)
    else:
        _ROWS_4(out, out_at, out_stride, weights, weights_at, weights_stride, rows, rows_at, stride, count)


@intrinsic
def dot(typingctx: Any, x: Any, x_at: Any, row: Any, row_at: Any, size: Any) -> Any:
    """Sum over k < size of x[x_at + k] * row[row_at + k]; four vector partial sums, `size` a multiple of 16."""
    assert _is_weight(row.dtype)
    signature = types.float32(x, types.intp, row, types.intp, types.intp)
    row_dtype = row.dtype

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x_type, _, row_type, _, _ = signature.args
        x_pointer = element_pointer(context, builder, x_type, args[0], args[1])
        row_pointer = element_pointer(context, builder, row_type, args[2], args[3])
        sums = [cgutils.alloca_once(builder, _VECTOR) for _ in range(4)]
        for total in sums:
            builder.store(ir.Constant(_VECTOR, [0.0] * LANES), total)

        def accumulate(at: Any, total: Any) -> None:
            a = load_vector(builder, builder.gep(x_pointer, [at]), types.float32)
            b = load_vector(builder, builder.gep(row_pointer, [at]), row_dtype)
            builder.store(multiply_add(builder, a, b, builder.load(total)), total)

        wide = ir.Constant(args[4].type, 4 * LANES)
        full = builder.udiv(args[4], wide)
        with cgutils.for_range(builder, full) as loop:
            base = builder.mul(loop.index, wide)
            for lane, total in enumerate(sums):
                accumulate(builder.add(base, ir.Constant(base.type, lane * LANES)), total)
        rest = builder.udiv(builder.sub(args[4], builder.mul(full, wide)), ir.Constant(args[4].type, LANES))
        with cgutils.for_range(builder, rest) as loop:
            offset = builder.mul(loop.index, ir.Constant(loop.index.type, LANES))
            accumulate(builder.add(builder.mul(full, wide), offset), sums[0])
        s0, s1, s2, s3 = (builder.load(total) for total in sums)
        vector = builder.fadd(builder.fadd(s0, s1), builder.fadd(s2, s3))
        return horizontal_sum(builder, vector)

    return signature, codegen


def fold_vector(builder: Any, vector: Any, join: Any) -> Any:
    """Join lane i with lane i + width / 2 until one lane is left."""
    width = vector.type.count
    while width > 1:
        width //= 2
        lanes = ir.VectorType(ir.IntType(32), width)
        undefined = ir.Constant(vector.type, ir.Undefined)
        low = builder.shuffle_vector(vector, undefined, ir.Constant(lanes, list(range(width))))
        high = builder.shuffle_vector(vector, undefined, ir.Constant(lanes, list(range(width, 2 * width))))
        vector = join(low, high)
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


def horizontal_sum(builder: Any, vector: Any) -> Any:
    """Sum of a vector's lanes."""
    return fold_vector(builder, vector, builder.fadd)


def _fold(builder: Any, pointer: Any, size: Any, start: Any, join: Any) -> Any:
    """Join `size` float32, a multiple of 16, to a vector, lane by lane and in order."""
    total = cgutils.alloca_once(builder, _VECTOR)
    builder.store(start, total)
    with cgutils.for_range(builder, builder.udiv(size, ir.Constant(size.type, LANES))) as loop:
        at = builder.mul(loop.index, ir.Constant(loop.index.type, LANES))
        part = load_as(builder, builder.gep(pointer, [at]), _VECTOR)
        builder.store(join(builder.load(total), part), total)
    return builder.load(total)


@intrinsic
def vector_max(typingctx: Any, values: Any, at: Any, size: Any) -> Any:
    """Largest of values[at : at + size], `size` a multiple of 16 and at least that; NaN may be overlooked."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", b, a), b, a)

        pointer = element_pointer(context, builder, signature.args[0], args[0], args[1])
        return fold_vector(
            builder, _fold(builder, pointer, args[2], load_as(builder, pointer, _VECTOR), larger), larger
        )

    return types.float32(values, types.intp, types.intp), codegen


@intrinsic
def vector_sum(typingctx: Any, values: Any, at: Any, size: Any) -> Any:
    """Sum of values[at : at + size], `size` a multiple of 16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = element_pointer(context, builder, signature.args[0], args[0], args[1])
        return horizontal_sum(builder, _fold(builder, pointer, args[2], _floats(0), builder.fadd))

    return types.float32(values, types.intp, types.intp), codegen


def exponential(builder: Any, x: Any) -> Any:
    """e to the power of 16 lanes of at most 88, 0 below -87."""
    integers = ir.VectorType(ir.IntType(32), LANES)
    floor = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_VECTOR, [_VECTOR]), f"llvm.floor.v{LANES}f32"
    )
    n = builder.call(floor, [multiply_add(builder, x, _floats(LOG2_E), _floats(0.5))])
    r = multiply_add(builder, n, _floats(-LN2_HIGH), x)
    r = multiply_add(builder, n, _floats(-LN2_LOW), r)
    y = _floats(EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        y = multiply_add(builder, y, r, _floats(term))
    y = builder.fadd(multiply_add(builder, y, builder.fmul(r, r), r), _floats(1))
    exponent = builder.add(builder.fptosi(n, integers), ir.Constant(integers, [127] * LANES))
    power = builder.bitcast(builder.shl(exponent, ir.Constant(integers, [23] * LANES)), _VECTOR)
    small = builder.fcmp_ordered("<", x, _floats(MIN_EXPONENT))
    return builder.select(small, _floats(0), builder.fmul(y, power))


def narrowed(builder: Any, values: Any) -> Any:
    """16 float32 as bfloat16 bits, rounded as `math.to_bfloat16` does."""
    integers = ir.VectorType(ir.IntType(32), LANES)

    def each(value: int) -> Any:
        return ir.Constant(integers, [value] * LANES)

    bits = builder.bitcast(values, integers)
    upper = builder.lshr(bits, each(16))
    rounded = builder.add(builder.add(bits, each(0x7FFF)), builder.and_(upper, each(1)))
    is_nan = builder.icmp_unsigned(">", builder.and_(bits, each(0x7FFFFFFF)), each(0x7F800000))
    words = builder.select(is_nan, each(0x7FC0), builder.lshr(rounded, each(16)))
    return builder.trunc(words, ir.VectorType(ir.IntType(16), LANES))


@intrinsic
def exponentials(typingctx: Any, out: Any, out_at: Any, stride: Any, values: Any, at: Any, size: Any, top: Any) -> Any:
    """bfloat16 of exp(value - top) for values[at : at + size], 16 at out[out_at + i * stride]; returns the float32 sum.

    `size` is a multiple of 16; no value is above `top`; what is far below it gives 0.
    """
    place = types.intp
    signature = types.float32(out, place, place, values, place, place, types.float32)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target = element_pointer(context, builder, signature.args[0], args[0], args[1])
        source = element_pointer(context, builder, signature.args[3], args[3], args[4])
        tops = splat(builder, args[6])
        total = cgutils.alloca_once(builder, _VECTOR)
        builder.store(ir.Constant(_VECTOR, [0.0] * LANES), total)
        with cgutils.for_range(builder, builder.udiv(args[5], ir.Constant(args[5].type, LANES))) as loop:
            at = builder.mul(loop.index, ir.Constant(loop.index.type, LANES))
            part = load_as(builder, builder.gep(source, [at]), _VECTOR)
            power = exponential(builder, builder.fsub(part, tops))
            builder.store(builder.fadd(builder.load(total), power), total)
            store_as(builder, narrowed(builder, power), builder.gep(target, [builder.mul(loop.index, args[2])]), 2)
        return horizontal_sum(builder, builder.load(total))

    return signature, codegen
