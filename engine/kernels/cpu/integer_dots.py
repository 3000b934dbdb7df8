"""Products of token rows with rows of 8-bit and 4-bit weights where AMX is missing: vector loops in LLVM IR.

A neuron's groups lie side by side in the lanes of a vector, eight at a time, so that a lane ends up with the sum of a
group and nothing has to be added across lanes but once for each neuron. Its row is still one stretch of memory, which
is read in order. See `quantised.lane_order`, also for what is left of less than eight groups.

Token rows meet int8 as integers of 15 bits and a sign, int4 as two parts of int8, 128 * high + low, as in AMX: there
the instruction for bytes takes twice as many values, and 4 bits leave room for its sums of 16 bits.
"""

from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.cpu.integer_simd import LOW_BITS
from engine.kernels.cpu.integer_words import call_llvm, multiply_words
from engine.kernels.cpu.isa import features
from engine.kernels.cpu.quantised import INT4_GROUP, INT4_UNIT, INT8_GROUP, INT8_UNIT, LANES
from engine.kernels.cpu.simd import (
    advance,
    element_pointer,
    horizontal_sum,
    load_as,
    load_vector,
    multiply_add,
    prefetch_line,
    store_as,
    times,
)

_FLOAT, _INT, _LONG, _BYTE, _SHORT = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(8), ir.IntType(16)
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(_FLOAT, LANES)
_WORDS, _LINE = ir.VectorType(_SHORT, 2 * LANES), ir.VectorType(_BYTE, 4 * LANES)
_HALF_LINE = ir.VectorType(_BYTE, 2 * LANES)
_CACHE_LINE = 64
_UNROLLED = 8  # vectors of weights in one turn of a loop


def _constants(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def multiply_bytes(builder: Any, unsigned: Any, signed: Any) -> Any:
    """Sums of two products each, int16 [2 * LANES], of bytes [4 * LANES]; these must not exceed 16 bits."""
    if "avx2" not in features():
        return multiply_bytes_plainly(builder, unsigned, signed)
    return call_llvm(builder, "llvm.x86.avx2.pmadd.ub.sw", _WORDS, unsigned, signed)


def multiply_bytes_plainly(builder: Any, unsigned: Any, signed: Any) -> Any:
    """`multiply_bytes` for any processor."""
    products = []
    for parity in range(2):
        lanes = ir.Constant(ir.VectorType(_INT, 2 * LANES), list(range(parity, 4 * LANES, 2)))
        own, other = (builder.shuffle_vector(line, _constants(_LINE, 0), lanes) for line in (unsigned, signed))
        products.append(builder.mul(builder.zext(own, _WORDS), builder.sext(other, _WORDS)))
    return builder.add(*products)


def _int8_vector(builder: Any, weights: Any, inputs: list[Any], sums: list[Any]) -> None:
    """Add the products of 16 weights to the sums [tokens] of int32."""
    wide = builder.sext(load_as(builder, weights, _HALF_LINE, 1), _WORDS)
    for pointer, total in zip(inputs, sums, strict=True):
        words = load_as(builder, pointer, _WORDS, 2)
        builder.store(multiply_words(builder, builder.load(total), wide, words), total)


def _int4_vector(builder: Any, weights: Any, inputs: list[Any], sums: list[Any], size: Any) -> None:
    """Add the products of 64 weights to the sums [tokens * 2 parts] of int16."""
    pairs, low = load_as(builder, weights, _WORDS, 1), _constants(_WORDS, 0x0F0F)
    halves = builder.and_(pairs, low), builder.and_(builder.lshr(pairs, _constants(_WORDS, 4)), low)
    for at, half in enumerate(halves):
        unsigned = builder.bitcast(half, _LINE)
        for i, total in enumerate(sums):
            pointer = advance(builder, inputs[i // 2], 4 * LANES * at)
            signed = load_as(builder, advance(builder, pointer, size) if i % 2 else pointer, _LINE, 1)
            products = multiply_bytes(builder, unsigned, signed)
            builder.store(builder.add(builder.load(total), products), total)


def _join_parts(builder: Any, sums: list[Any]) -> list[Any]:
    """128 * high + low of the parts' sums of 16 bits, two of a lane: int32 [tokens]."""
    joined, ones = [], _constants(_WORDS, 1)
    for high, low in zip(sums[::2], sums[1::2], strict=True):
        total = multiply_words(builder, _constants(_INTS, 0), high, _constants(_WORDS, 1 << LOW_BITS))
        joined.append(multiply_words(builder, total, low, ones))
    return joined


def _by_lane(builder: Any, pointer: Any, count: int, *, once: bool = False) -> Any:
    """Factors of `count` groups, float32 or bfloat16 bits, in each group's lanes, or in the first of them only."""
    dtype = types.uint16 if pointer.type.pointee == _SHORT else types.float32
    factors = load_vector(builder, pointer, dtype, count)
    share = LANES // count
    lanes = [count if once and lane % share else lane // share for lane in range(LANES)]
    order = ir.Constant(ir.VectorType(_INT, LANES), lanes)
    return builder.shuffle_vector(factors, ir.Constant(factors.type, [0.0] * count), order)


def _make_dots(tokens: int) -> Any:
    """Intrinsic for `tokens` token rows with one neuron of weights."""

    @intrinsic
    def dots(
        typingctx: Any,
        out: Any,
        at: Any,
        stride: Any,
        rows: Any,
        row: Any,
        size: Any,
        row_scales: Any,
        row_sums: Any,
        values: Any,
        neuron: Any,
        following: Any,
        scales: Any,
        minima: Any,
    ) -> Any:
        bits, group, parts = (8, INT8_GROUP, 1) if rows.dtype == types.int16 else (4, INT4_GROUP, 2)
        # Values of a vector of weights, of 16 or 32 bytes.
        taken = LANES * (INT8_UNIT if bits == 8 else 2 * INT4_UNIT)
        place = types.intp
        signature = types.void(
            out, place, place, rows, place, place, row_scales, row_sums, values, place, place, scales, minima
        )

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds, size = signature.args, args[5]
            groups = builder.udiv(size, ir.Constant(_LONG, group))
            line = builder.udiv(times(builder, size, bits), ir.Constant(_LONG, 8))  # bytes of a neuron

            def array(i: int, offset: Any) -> Any:
                return element_pointer(context, builder, kinds[i], args[i], offset)

            own = [builder.add(args[4], ir.Constant(_LONG, t)) for t in range(tokens)]
            inputs = [array(3, times(builder, builder.mul(r, size), parts)) for r in own]
            row_factors = [[array(i, builder.mul(r, groups)) for r in own] for i in (6, 7)]
            weights, ahead = (array(8, builder.mul(args[i], line)) for i in (9, 10))
            factors = [array(i, builder.mul(args[9], groups)) for i in (11, 12)]
            totals = [cgutils.alloca_once(builder, _FLOATS) for _ in range(tokens)]
            sums = [cgutils.alloca_once(builder, _INTS if bits == 8 else _WORDS) for _ in range(tokens * parts)]
            for total in totals:
                builder.store(ir.Constant(_FLOATS, [0.0] * LANES), total)

            def add_block(first: Any, count: int) -> None:
                """Add `count` groups from `first` on."""
                begin, vectors = times(builder, first, group), count * group // taken
                unrolled = min(vectors, _UNROLLED)
                for total in sums:
                    builder.store(_constants(total.type.pointee, 0), total)
                with cgutils.for_range(builder, ir.Constant(_LONG, vectors // unrolled)) as loop:
                    value = builder.add(begin, times(builder, loop.index, unrolled * taken))
                    byte = builder.udiv(times(builder, value, bits), ir.Constant(_LONG, 8))
                    for v in range(unrolled):
                        offset = v * taken * bits // 8
                        if offset % _CACHE_LINE == 0:
                            prefetch_line(builder, advance(builder, ahead, byte, offset))
                        source = advance(builder, weights, byte, offset)
                        met = [advance(builder, pointer, value, v * taken) for pointer in inputs]
                        if bits == 8:
                            _int8_vector(builder, source, met, sums)
                        else:
                            _int4_vector(builder, source, met, sums, size)
                wholes = [builder.load(total) for total in sums]
                wholes = wholes if bits == 8 else _join_parts(builder, wholes)
                spread = partial(_by_lane, builder, count=count)
                own_scales, own_minima = (advance(builder, pointer, first) for pointer in factors)
                scale = spread(own_scales)
                minimum = spread(own_minima, once=True) if bits == 4 else None
                for t, (total, whole) in enumerate(zip(totals, wholes, strict=True)):
                    row_scale, row_sum = (advance(builder, pointers[t], first) for pointers in row_factors)
                    factor = builder.fmul(scale, spread(row_scale))
                    result = multiply_add(builder, builder.sitofp(whole, _FLOATS), factor, builder.load(total))
                    if minimum is not None:
                        result = multiply_add(builder, minimum, spread(row_sum, once=True), result)
                    builder.store(result, total)

            with cgutils.for_range(builder, builder.udiv(groups, ir.Constant(_LONG, LANES))) as loop:
                add_block(times(builder, loop.index, LANES), LANES)
            for count in (4, 2, 1) if bits == 8 else (4, 2):  # a row has whole pairs of groups of 32
                bit = builder.and_(groups, ir.Constant(_LONG, count))
                with builder.if_then(builder.icmp_unsigned("!=", bit, ir.Constant(_LONG, 0))):
                    add_block(builder.and_(groups, ir.Constant(_LONG, -2 * count)), count)
            target = array(0, args[1])
            for t, total in enumerate(totals):
                value = horizontal_sum(builder, builder.load(total))
                store_as(builder, value, advance(builder, target, times(builder, args[2], t)))
            return context.get_dummy_value()

        return signature, codegen

    return dots


# out[at + t * stride] = sum over groups g of (row[t] . values of the neuron in g) * (scales[g] * row_scales[t, g]) for
# token rows from `row` on; int4 adds minima[g] * row_sums[t, g].
#   rows, row_scales, row_sums: see `PlainIntegerRows`, whose type says how many bits the weights have;
#   values, scales, minima: see `PlainIntegerWeight`; following: a neuron whose values are fetched meanwhile.
dots_1, dots_2, dots_3, dots_4 = (_make_dots(tokens) for tokens in range(1, 5))
