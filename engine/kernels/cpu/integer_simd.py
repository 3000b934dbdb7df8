"""Vector loops around integer products, in LLVM IR: float32 values to the integers of a group, integers of a group to
float32 sums, and 4-bit values to bytes.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.cpu.simd import (
    LANES,
    alternate,
    element_pointer,
    fold_vector,
    load_as,
    load_vector,
    multiply_add,
    pair_up,
    prefetch_line,
    splat,
    store_as,
)

_INT, _LONG, _BYTE = ir.IntType(32), ir.IntType(64), ir.IntType(8)
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(ir.FloatType(), LANES)
LOW_BITS = 7  # of a token row's integers, whose upper bits are multiplied apart


ROUNDED = 32  # values that are made integers at a time, a divisor of all groups


@intrinsic
def largest_of(typingctx: Any, values: Any, at: Any) -> Any:
    """Bits, int32, of the largest absolute value of `ROUNDED` float32 values from `at` on; NaN is larger than all."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.VectorType(_INT, ROUNDED)
        bits = load_as(builder, element_pointer(context, builder, signature.args[0], *args), kind)
        # Without its sign a float orders like its bits, and the maximum of integers is one instruction.
        magnitudes = builder.and_(bits, ir.Constant(kind, [0x7FFFFFFF] * ROUNDED))
        return fold_vector(builder, magnitudes, lambda a, b: builder.select(builder.icmp_signed(">", a, b), a, b))

    return types.int32(values, types.intp), codegen


@intrinsic
def round_values(typingctx: Any, values: Any, at: Any, inverse: Any, out: Any, out_at: Any) -> Any:
    """out = values * inverse, rounded to int16 (ties to even), `ROUNDED` of them; returns their int32 sum."""
    place = types.intp

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = element_pointer(context, builder, signature.args[0], args[0], args[1])
        target = element_pointer(context, builder, signature.args[3], args[3], args[4])
        floats, shorts = ir.VectorType(ir.FloatType(), ROUNDED), ir.VectorType(ir.IntType(16), ROUNDED)
        scaled = builder.fmul(load_as(builder, source, floats), splat(builder, args[2], ROUNDED))
        rint = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(floats, [floats]), f"llvm.rint.v{ROUNDED}f32"
        )
        whole = builder.fptosi(builder.call(rint, [scaled]), ir.VectorType(_INT, ROUNDED))
        store_as(builder, builder.trunc(whole, shorts), target, align=2)
        return fold_vector(builder, whole, builder.add)

    return types.int32(values, place, types.float32, out, place), codegen


@intrinsic
def split_values(typingctx: Any, values: Any, at: Any, high: Any, low: Any, out_at: Any) -> Any:
    """128 * high + low = values, int8 each, of `ROUNDED` int16 values."""
    place = types.intp

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind, parts = ir.VectorType(ir.IntType(16), ROUNDED), ir.VectorType(_BYTE, ROUNDED)
        whole = load_as(builder, element_pointer(context, builder, signature.args[0], args[0], args[1]), kind, align=2)
        shift, half = (ir.Constant(kind, [value] * ROUNDED) for value in (LOW_BITS, 1 << (LOW_BITS - 1)))
        upper = builder.ashr(builder.add(whole, half), shift)
        for array, part in ((2, upper), (3, builder.sub(whole, builder.shl(upper, shift)))):
            target = element_pointer(context, builder, signature.args[array], args[array], args[4])
            store_as(builder, builder.trunc(part, parts), target, align=1)
        return context.get_dummy_value()

    return types.void(values, place, high, low, place), codegen


def _step(builder: Any, pointer: Any, offset: int) -> Any:
    return builder.gep(pointer, [ir.Constant(_LONG, offset)])


def _whole(builder: Any, high: Any, low: Any) -> Any:
    """high * 128 + low as float32."""
    shifted = builder.shl(high, ir.Constant(_INTS, [LOW_BITS] * LANES))
    return builder.sitofp(builder.add(shifted, low), _FLOATS)


def _bfloat16_scalar(builder: Any, pointer: Any) -> Any:
    bits = builder.shl(builder.zext(builder.load(pointer), _INT), ir.Constant(_INT, 16))
    return splat(builder, builder.bitcast(bits, ir.FloatType()))


def add_scaled(builder: Any, sums: Any, whole: Any, scales: Any, row: Any) -> None:
    """sums += whole * (scales * row) of some neurons: pointers to float32 and bfloat16, float32 vector and scalar."""
    lanes = whole.type.count
    factor = builder.fmul(load_vector(builder, scales, types.uint16, lanes), splat(builder, row, lanes))
    store_as(builder, multiply_add(builder, whole, factor, load_as(builder, sums, whole.type)), sums)


@intrinsic
def add_tile(
    typingctx: Any,
    sums: Any,
    at: Any,
    high: Any,
    high_at: Any,
    low: Any,
    low_at: Any,
    scales: Any,
    scales_at: Any,
    rows: Any,
    rows_at: Any,
) -> Any:
    """sums[at + 16 n + r] += (128 high + low)[16 n + r] * (scales[n] * rows[r]), for n and r < 16.

    high, low: int32. scales: bfloat16 bits, of 16 neurons. rows: float32, scales of 16 token rows.
    """
    place = types.intp
    signature = types.void(sums, place, high, place, low, place, scales, place, rows, place)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointers = [element_pointer(context, builder, signature.args[i], args[i], args[i + 1]) for i in range(0, 10, 2)]
        sums, high, low, scales, rows = pointers
        row_scales = load_as(builder, rows, _FLOATS)
        for n in range(LANES):
            target = _step(builder, sums, n * LANES)
            counts = (load_as(builder, _step(builder, part, n * LANES), _INTS) for part in (high, low))
            factor = builder.fmul(_bfloat16_scalar(builder, _step(builder, scales, n)), row_scales)
            total = multiply_add(builder, _whole(builder, *counts), factor, load_as(builder, target, _FLOATS))
            store_as(builder, total, target)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def add_column(
    typingctx: Any,
    sums: Any,
    at: Any,
    high: Any,
    high_at: Any,
    low: Any,
    low_at: Any,
    scales: Any,
    scales_at: Any,
    row: Any,
) -> Any:
    """sums[at + n] += (128 high + low)[n] * (scales[n] * row) for n < 16: `add_tile` for one token row."""
    place = types.intp
    signature = types.void(sums, place, high, place, low, place, scales, place, types.float32)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointers = [element_pointer(context, builder, signature.args[i], args[i], args[i + 1]) for i in range(0, 8, 2)]
        sums, high, low, scales = pointers
        whole = _whole(builder, load_as(builder, high, _INTS), load_as(builder, low, _INTS))
        add_scaled(builder, sums, whole, scales, args[8])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def add_integers(
    typingctx: Any, sums: Any, at: Any, whole: Any, whole_at: Any, scales: Any, scales_at: Any, row: Any
) -> Any:
    """`add_column` of integers that are whole already."""
    place = types.intp

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, whole, scales = (
            element_pointer(context, builder, signature.args[i], args[i], args[i + 1]) for i in range(0, 6, 2)
        )
        add_scaled(builder, sums, builder.sitofp(load_as(builder, whole, _INTS), _FLOATS), scales, args[6])
        return context.get_dummy_value()

    return types.void(sums, place, whole, place, scales, place, types.float32), codegen


@intrinsic
def add_minima(typingctx: Any, sums: Any, at: Any, minima: Any, minima_at: Any, rows: Any, rows_at: Any) -> Any:
    """sums[at + 16 n + r] += minima[n] * rows[r] for n and r < 16. minima: bfloat16 bits; rows: float32."""
    place = types.intp

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, minima, rows = (
            element_pointer(context, builder, signature.args[i], args[i], args[i + 1]) for i in range(0, 6, 2)
        )
        totals = load_as(builder, rows, _FLOATS)
        for n in range(LANES):
            target = _step(builder, sums, n * LANES)
            minimum = _bfloat16_scalar(builder, _step(builder, minima, n))
            store_as(builder, multiply_add(builder, minimum, totals, load_as(builder, target, _FLOATS)), target)
        return context.get_dummy_value()

    return types.void(sums, place, minima, place, rows, place), codegen


@intrinsic
def widen_int4(typingctx: Any, values: Any, at: Any, out: Any, out_at: Any, distance: Any) -> Any:
    """Lower halves of 32 bytes to 32 bytes of `out`, upper halves to 32 that begin `distance` further on."""
    lanes = 32
    line = ir.VectorType(_BYTE, lanes)
    place = types.intp

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = element_pointer(context, builder, signature.args[0], args[0], args[1])
        target = element_pointer(context, builder, signature.args[2], args[2], args[3])
        pairs = load_as(builder, source, line, align=1)
        low, high = (ir.Constant(line, [bits] * lanes) for bits in (15, 4))
        store_as(builder, builder.and_(pairs, low), target, align=1)
        store_as(builder, builder.lshr(pairs, high), builder.gep(target, [args[4]]), align=1)
        return context.get_dummy_value()

    return types.void(values, place, out, place, place), codegen


# One token row. AMX would leave most of its columns empty; VNNI, which comes with it, multiplies 64 values of a neuron
# in one instruction, unsigned by signed bytes, and gives the same integers.

_LINE = ir.VectorType(_BYTE, 4 * LANES)
_OFFSET = 128  # what makes int8 unsigned


def _bytes(value: int) -> Any:
    return ir.Constant(_LINE, [value] * 4 * LANES)


def _multiply_bytes(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """total[i] += sum of unsigned[4 i + k] * signed[4 i + k], k < 4."""
    kind = ir.FunctionType(_INTS, [_INTS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
    return builder.call(function, [total, builder.bitcast(unsigned, _INTS), builder.bitcast(signed, _INTS)])


def _shuffle(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(order)), order))


def _fours(builder: Any, a: Any, b: Any, places: Sequence[int]) -> Any:
    """Fours of lanes, counted through a and then b."""
    return _shuffle(builder, a, b, [4 * four + k for four in places for k in range(4)])


def _add_halves(builder: Any, a: Any, b: Any, count: int) -> Any:
    """Add the halves of what each of `count` vectors still is in a and b, so that one vector holds it.

    Lanes stay in their four as long as there is something to add in it: that is what processors shuffle fast.
    """
    lanes = a.type.count
    if count == 2:
        return builder.add(*(_shuffle(builder, a, b, order) for order in alternate(lanes)))
    if count == 4:
        return builder.add(*(_shuffle(builder, a, b, order) for order in pair_up(lanes)))
    spread = 2 * lanes // count  # fours of lanes of each vector
    first = [four for four in range(lanes // 2) if four % spread < spread // 2]
    second = [four + spread // 2 for four in first]
    return builder.add(_fours(builder, a, b, first), _fours(builder, a, b, second))


def _added(builder: Any, vectors: list[Any]) -> Any:
    """Vectors of int32, added up until one holds them: with as many as it has lanes, lane n is the sum of vector n."""
    count = len(vectors)
    if count == 1:
        return vectors[0]
    half = count // 2
    return _add_halves(builder, _added(builder, vectors[:half]), _added(builder, vectors[half:]), count)


def _totals_of_halves(builder: Any, parts: list[Any]) -> list[Any]:
    """The sums of the lower halves of 16 vectors, and of the upper ones."""
    a, b, c, d = (_added(builder, parts[first : first + 4]) for first in range(0, LANES, 4))
    totals = []
    for pair in ((0, 1, 4, 5), (2, 3, 6, 7)):
        left, right = _fours(builder, a, b, pair), _fours(builder, c, d, pair)
        totals.append(
            builder.add(_fours(builder, left, right, (0, 2, 4, 6)), _fours(builder, left, right, (1, 3, 5, 7)))
        )
    return totals


def _neuron_sums(builder: Any, high: Any, low: Any, start: Any, weights: list[Any]) -> list[Any]:
    """128 high + low, added up by lane, of each neuron's 64 unsigned weights."""
    shift = ir.Constant(_INTS, [LOW_BITS] * LANES)
    return [
        _multiply_bytes(builder, builder.shl(_multiply_bytes(builder, start, line, high), shift), line, low)
        for line in weights
    ]


def _row_pointers(context: Any, builder: Any, kinds: Any, args: Any, places: tuple[int, ...]) -> list[Any]:
    """Addresses of arrays of one token row."""
    first = ir.Constant(_LONG, 0)
    return [element_pointer(context, builder, kinds[i], args[i], first) for i in places]


def _load_row(builder: Any, pointers: list[Any], at: Any) -> list[Any]:
    """64 bytes from `at` on, of each part."""
    return [load_as(builder, builder.gep(builder.bitcast(p, _BYTE.as_pointer()), [at]), _LINE, 1) for p in pointers]


@intrinsic
def dot_int8(
    typingctx: Any,
    out: Any,
    at: Any,
    high: Any,
    low: Any,
    row_scales: Any,
    scales_stride: Any,
    values: Any,
    values_at: Any,
    size: Any,
    scales: Any,
    scales_at: Any,
) -> Any:
    """out[at + n] = sum over groups g of (128 high + low) . values of neuron n in g * (scales[g, n] * row_scales[g]).

    For 16 neurons. high, low: int8 words [size / 4] of one token row. row_scales: float32, those of groups
    `scales_stride` apart. values: int8, from `values_at` on [16, size]. scales: bfloat16 bits [groups, 16].
    """
    place = types.intp
    signature = types.void(out, place, high, low, row_scales, place, values, place, place, scales, place)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        target = element_pointer(context, builder, kinds[0], args[0], args[1])
        *parts, row_scales = _row_pointers(context, builder, kinds, args, (2, 3, 4))
        values = element_pointer(context, builder, kinds[6], args[6], args[7])
        scales = element_pointer(context, builder, kinds[9], args[9], args[10])
        size = args[8]
        total = cgutils.alloca_once(builder, _FLOATS)
        builder.store(ir.Constant(_FLOATS, [0.0] * LANES), total)
        group = ir.Constant(_LONG, 4 * LANES)
        with cgutils.for_range(builder, builder.udiv(size, group)) as loop:
            begin = builder.mul(loop.index, group)
            high, low = _load_row(builder, parts, begin)
            # Weights are moved up by 128; what that adds is taken away first, that of the low part in units of 128.
            zero = ir.Constant(_INTS, [0] * LANES)
            start = builder.sub(zero, _multiply_bytes(builder, zero, _bytes(_OFFSET), high))
            start = builder.sub(start, _multiply_bytes(builder, zero, _bytes(1), low))
            lines = []
            for n in range(LANES):
                line = builder.gep(values, [builder.add(begin, builder.mul(size, ir.Constant(_LONG, n)))])
                prefetch_line(builder, builder.gep(line, [builder.mul(size, ir.Constant(_LONG, 2 * LANES))]))
                lines.append(builder.xor(load_as(builder, line, _LINE, align=1), _bytes(_OFFSET)))
            sums = _neuron_sums(builder, high, low, start, lines)
            whole = builder.sitofp(_added(builder, sums), _FLOATS)
            row = builder.load(builder.gep(row_scales, [builder.mul(loop.index, args[5])]))
            neurons = builder.gep(scales, [builder.mul(loop.index, ir.Constant(_LONG, LANES))])
            factor = builder.fmul(load_vector(builder, neurons, types.uint16), splat(builder, row))
            builder.store(multiply_add(builder, whole, factor, builder.load(total)), total)
        store_as(builder, builder.load(total), target)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def dot_int4(
    typingctx: Any,
    out: Any,
    at: Any,
    high: Any,
    low: Any,
    row_scales: Any,
    row_sums: Any,
    scales_stride: Any,
    values: Any,
    values_at: Any,
    size: Any,
    scales: Any,
    minima: Any,
    scales_at: Any,
) -> Any:
    """`dot_int8` of 4-bit values, two of a byte 32 apart, plus minima[g, n] * row_sums[g]; groups have 32 values."""
    place = types.intp
    signature = types.void(
        out, place, high, low, row_scales, row_sums, place, values, place, place, scales, minima, place
    )
    half = ir.VectorType(_BYTE, 2 * LANES)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        target = element_pointer(context, builder, kinds[0], args[0], args[1])
        *parts, row_scales, row_sums = _row_pointers(context, builder, kinds, args, (2, 3, 4, 5))
        values = element_pointer(context, builder, kinds[7], args[7], args[8])
        scales, minima = (element_pointer(context, builder, kinds[i], args[i], args[12]) for i in (10, 11))
        packed = builder.udiv(args[9], ir.Constant(_LONG, 2))  # bytes of a neuron
        total = cgutils.alloca_once(builder, _FLOATS)
        builder.store(ir.Constant(_FLOATS, [0.0] * LANES), total)
        low_bits, high_bits = (ir.Constant(half, [bits] * 2 * LANES) for bits in (15, 4))
        with cgutils.for_range(builder, builder.udiv(args[9], ir.Constant(_LONG, 4 * LANES))) as loop:
            begin = builder.mul(loop.index, ir.Constant(_LONG, 4 * LANES))
            high, low = _load_row(builder, parts, begin)
            lines = []
            for n in range(LANES):
                at = builder.add(builder.udiv(begin, ir.Constant(_LONG, 2)), builder.mul(packed, ir.Constant(_LONG, n)))
                line = builder.gep(values, [at])
                if n % 2 == 0:
                    prefetch_line(builder, builder.gep(line, [builder.mul(packed, ir.Constant(_LONG, 2 * LANES))]))
                pairs = load_as(builder, line, half, align=1)
                halves = builder.and_(pairs, low_bits), builder.lshr(pairs, high_bits)
                order = ir.Constant(ir.VectorType(_INT, 4 * LANES), list(range(4 * LANES)))
                lines.append(builder.shuffle_vector(*halves, order))
            zero = ir.Constant(_INTS, [0] * LANES)
            sums = _totals_of_halves(builder, _neuron_sums(builder, high, low, zero, lines))
            for which, integers in enumerate(sums):
                group = builder.add(builder.mul(loop.index, ir.Constant(_LONG, 2)), ir.Constant(_LONG, which))
                place = builder.mul(group, args[6])
                neurons = builder.mul(group, ir.Constant(_LONG, LANES))
                row, row_sum = (builder.load(builder.gep(part, [place])) for part in (row_scales, row_sums))
                scale, minimum = (
                    load_vector(builder, builder.gep(part, [neurons]), types.uint16) for part in (scales, minima)
                )
                factor = builder.fmul(scale, splat(builder, row))
                result = multiply_add(builder, builder.sitofp(integers, _FLOATS), factor, builder.load(total))
                builder.store(multiply_add(builder, minimum, splat(builder, row_sum), result), total)
        store_as(builder, builder.load(total), target)
        return context.get_dummy_value()

    return signature, codegen
