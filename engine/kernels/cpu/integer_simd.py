"""Vector loops around integer products, in LLVM IR: integers of a group to float32 sums, and 4-bit values to bytes."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from engine.kernels.cpu.simd import LANES, element_pointer, load_as, load_vector, multiply_add, splat, store_as

_INT, _LONG, _BYTE = ir.IntType(32), ir.IntType(64), ir.IntType(8)
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(ir.FloatType(), LANES)
LOW_BITS = 7  # of a token row's integers, whose upper bits are multiplied apart


def _step(builder: Any, pointer: Any, offset: int) -> Any:
    return builder.gep(pointer, [ir.Constant(_LONG, offset)])


def _whole(builder: Any, high: Any, low: Any) -> Any:
    """high * 128 + low as float32."""
    shifted = builder.shl(high, ir.Constant(_INTS, [LOW_BITS] * LANES))
    return builder.sitofp(builder.add(shifted, low), _FLOATS)


def _bfloat16_scalar(builder: Any, pointer: Any) -> Any:
    bits = builder.shl(builder.zext(builder.load(pointer), _INT), ir.Constant(_INT, 16))
    return splat(builder, builder.bitcast(bits, ir.FloatType()))


def _add_scaled(builder: Any, sums: Any, whole: Any, scales: Any, row: Any) -> None:
    """sums += whole * (scales * row) of 16 neurons: pointers to float32 and bfloat16, float32 vector and scalar."""
    factor = builder.fmul(load_vector(builder, scales, types.uint16), splat(builder, row))
    store_as(builder, multiply_add(builder, whole, factor, load_as(builder, sums, _FLOATS)), sums)


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
        _add_scaled(builder, sums, whole, scales, args[8])
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
        _add_scaled(builder, sums, builder.sitofp(load_as(builder, whole, _INTS), _FLOATS), scales, args[6])
        return context.get_dummy_value()

    return types.void(sums, place, whole, place, scales, place, types.float32), codegen


@intrinsic
def add_pairs(
    typingctx: Any, sums: Any, at: Any, pairs: Any, pairs_at: Any, scales: Any, scales_at: Any, row: Any
) -> Any:
    """`add_column` where the integers lie in pairs: high of n at pairs[pairs_at + 2 n], low behind it."""
    place = types.intp

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, pairs, scales = (
            element_pointer(context, builder, signature.args[i], args[i], args[i + 1]) for i in range(0, 6, 2)
        )
        first, second = load_as(builder, pairs, _INTS), load_as(builder, _step(builder, pairs, LANES), _INTS)
        high, low = (
            builder.shuffle_vector(first, second, ir.Constant(_INTS, list(range(odd, 2 * LANES, 2)))) for odd in (0, 1)
        )
        _add_scaled(builder, sums, _whole(builder, high, low), scales, args[6])
        return context.get_dummy_value()

    return types.void(sums, place, pairs, place, scales, place, types.float32), codegen


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
def add_minima_column(typingctx: Any, sums: Any, at: Any, minima: Any, minima_at: Any, row: Any) -> Any:
    """sums[at + n] += minima[n] * row for n < 16: `add_minima` for one token row."""
    place = types.intp

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, minima = (
            element_pointer(context, builder, signature.args[i], args[i], args[i + 1]) for i in range(0, 4, 2)
        )
        minimum = load_vector(builder, minima, types.uint16)
        store_as(
            builder, multiply_add(builder, minimum, splat(builder, args[4]), load_as(builder, sums, _FLOATS)), sums
        )
        return context.get_dummy_value()

    return types.void(sums, place, minima, place, types.float32), codegen


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
