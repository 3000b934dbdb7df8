"""Products of 16-bit with 8-bit and 4-bit integers where AMX is missing: vector loops in LLVM IR.

Integers of a token row, 15 bits and a sign, meet sign-extended weights two by two: each lane takes the sum of two
products into 32 bits. AVX-512 with VNNI, AVX-512 and AVX2 have instructions for that; elsewhere LLVM finds its own.
A group's sums are exact, so neither their order nor the instruction matters; groups are added in order, as float32.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.cpu.integer_simd import add_scaled, lane_totals
from engine.kernels.cpu.isa import features, has_avx512
from engine.kernels.cpu.quantised import NEURONS
from engine.kernels.cpu.simd import (
    element_pointer,
    load_as,
    load_vector,
    multiply_add,
    prefetch_line,
    splat,
    store_as,
)

# Lanes of a sum: those of one register.
WIDTH = 16 if has_avx512() else 8
# Token rows that share what is made of weights.
TOKENS = 4

_INT, _LONG, _BYTE, _SHORT = ir.IntType(32), ir.IntType(64), ir.IntType(8), ir.IntType(16)
_INTS, _FLOATS = ir.VectorType(_INT, WIDTH), ir.VectorType(ir.FloatType(), WIDTH)
_WORDS, _BYTES = ir.VectorType(_SHORT, 2 * WIDTH), ir.VectorType(_BYTE, 2 * WIDTH)
_FETCHED = 16  # neurons ahead of those at hand


def _place(builder: Any, pointer: Any, *offsets: Any) -> Any:
    for offset in offsets:
        pointer = builder.gep(pointer, [ir.Constant(_LONG, offset) if isinstance(offset, int) else offset])
    return pointer


def _times(builder: Any, value: Any, factor: int) -> Any:
    return builder.mul(value, ir.Constant(_LONG, factor))


def _lanes(builder: Any, vector: Any, places: Any) -> Any:
    places = list(places)
    return builder.shuffle_vector(
        vector, ir.Constant(vector.type, ir.Undefined), ir.Constant(ir.VectorType(_INT, len(places)), places)
    )


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def multiply_words(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total[i] += a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1]: int32 [WIDTH], int16 [2 * WIDTH] twice."""
    if "avx512vnni" in features():
        pairs = (builder.bitcast(words, _INTS) for words in (a, b))
        return _call(builder, "llvm.x86.avx512.vpdpwssd.512", _INTS, total, *pairs)
    if has_avx512():
        return builder.add(total, _call(builder, "llvm.x86.avx512.pmaddw.d.512", _INTS, a, b))
    if "avx2" in features():
        return builder.add(total, _call(builder, "llvm.x86.avx2.pmadd.wd", _INTS, a, b))
    return multiply_words_plainly(builder, total, a, b)


def multiply_words_plainly(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """`multiply_words` for any processor."""
    for parity in range(2):
        lanes = range(parity, 2 * WIDTH, 2)
        wide = (builder.sext(_lanes(builder, words, lanes), _INTS) for words in (a, b))
        total = builder.add(total, builder.mul(*wide))
    return total


def _zeros(kind: Any = _INTS) -> Any:
    return ir.Constant(kind, [0] * kind.count)


def _widened_int8(builder: Any, pointer: Any, group: int) -> Iterator[Any]:
    """The group of 64 int8 of a neuron as vectors of words."""
    for at in range(0, 64, 2 * WIDTH):
        yield builder.sext(load_as(builder, _place(builder, pointer, at), _BYTES, 1), _WORDS)


def _widened_int4(builder: Any, pointer: Any, group: int) -> Iterator[Any]:
    """The lower (0) or upper (1) halves of 32 bytes as vectors of words."""
    low, high = (ir.Constant(_BYTES, [bits] * _BYTES.count) for bits in (15, 4))
    for at in range(0, 32, 2 * WIDTH):
        pairs = load_as(builder, _place(builder, pointer, at), _BYTES, 1)
        half = builder.and_(pairs, low) if group == 0 else builder.lshr(pairs, high)
        yield builder.zext(half, _WORDS)


def _make_dots(tokens: int, bits: int) -> Any:
    """Intrinsic for `tokens` token rows with 16 neurons of weights of so many bits."""
    widen, groups = (_widened_int8, 1) if bits == 8 else (_widened_int4, 2)  # groups of 64 values

    @intrinsic
    def dots(
        typingctx: Any,
        out: Any,
        at: Any,
        stride: Any,
        words: Any,
        row: Any,
        size: Any,
        row_scales: Any,
        row_sums: Any,
        values: Any,
        neuron: Any,
        scales: Any,
        minima: Any,
    ) -> Any:
        place = types.intp
        signature = types.void(
            out, place, place, words, place, place, row_scales, row_sums, values, place, scales, minima
        )

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds, (size, row, neuron) = signature.args, (args[5], args[4], args[9])
            chunks = builder.udiv(size, ir.Constant(_LONG, 64))
            num_groups = _times(builder, chunks, groups)
            line = builder.udiv(_times(builder, size, bits), ir.Constant(_LONG, 8))  # bytes of a neuron

            def array(i: int, offset: Any) -> Any:
                return element_pointer(context, builder, kinds[i], args[i], offset)

            target = array(0, args[1])
            inputs = [array(3, builder.mul(builder.add(row, ir.Constant(_LONG, t)), size)) for t in range(tokens)]
            row_factors = [array(i, builder.mul(row, num_groups)) for i in (6, 7)]
            weights = array(8, builder.mul(neuron, line))
            factors = [array(i, builder.mul(neuron, num_groups)) for i in (10, 11)]
            totals = [cgutils.alloca_once(builder, _FLOATS) for _ in range(tokens)]

            def sums_of(chunk: Any, group: int, first: int, lane: int) -> list[Any]:
                """Lanes' sums of neuron `first + lane` with each token row, in one group."""
                source = _place(builder, weights, _times(builder, line, first + lane), _times(builder, chunk, 8 * bits))
                if group == 0 and (bits == 8 or lane % 2 == 0):  # neurons to come, in the order of memory
                    ahead = _place(builder, weights, _times(builder, line, first + _FETCHED), lane * 8 * bits)
                    prefetch_line(builder, _place(builder, ahead, _times(builder, chunk, 8 * bits * WIDTH)))
                begin = builder.add(_times(builder, chunk, 64), ir.Constant(_LONG, 32 * group))
                sums = [_zeros()] * tokens
                for i, part in enumerate(widen(builder, source, group)):
                    for t, own in enumerate(inputs):
                        token = load_as(builder, _place(builder, own, begin, 2 * WIDTH * i), _WORDS, 2)
                        sums[t] = multiply_words(builder, sums[t], part, token)
                return sums

            for first in range(0, NEURONS, WIDTH):
                for total in totals:
                    builder.store(_zeros(_FLOATS), total)
                with cgutils.for_range(builder, chunks) as loop:
                    for g in range(groups):
                        wholes = lane_totals(builder, partial(sums_of, loop.index, g, first), WIDTH)
                        group = builder.add(_times(builder, loop.index, groups), ir.Constant(_LONG, g))
                        own_factors = (_place(builder, p, _times(builder, group, NEURONS), first) for p in factors)
                        scale, minimum = (load_vector(builder, p, types.uint16, WIDTH) for p in own_factors)
                        for t, (total, whole) in enumerate(zip(totals, wholes, strict=True)):
                            row_group = builder.add(_times(builder, num_groups, t), group)
                            row_scale, row_sum = (
                                splat(builder, builder.load(_place(builder, p, row_group)), WIDTH) for p in row_factors
                            )
                            factor = builder.fmul(scale, row_scale)
                            result = multiply_add(builder, builder.sitofp(whole, _FLOATS), factor, builder.load(total))
                            if bits == 4:
                                result = multiply_add(builder, minimum, row_sum, result)
                            builder.store(result, total)
                for t, total in enumerate(totals):
                    own = _place(builder, target, _times(builder, args[2], t), first)
                    store_as(builder, builder.load(total), own)
            return context.get_dummy_value()

        return signature, codegen

    return dots


# out[at + t * stride + n] = sum over groups g of (row[t] . values of neuron n in g) * (scales[g, n] * row_scales[t, g])
# for 16 neurons from `neuron` on and token rows from `row` on; int4 adds minima[g, n] * row_sums[t, g].
#   words: int16 [rows][size]; row_scales, row_sums: float32 [rows][groups]; values, scales, minima: see `quantised`.
# For int8 `minima` is read like `scales` and counts for nothing: pass these.
dots_int8_alone, dots_int8_together = _make_dots(1, 8), _make_dots(TOKENS, 8)
dots_int4_alone, dots_int4_together = _make_dots(1, 4), _make_dots(TOKENS, 4)


def _make_add_group(tokens: int, vectors: int) -> Any:
    """Intrinsic that adds a group of 64 neurons to `WIDTH * vectors` columns of `tokens` token rows."""

    @intrinsic
    def add_group(
        typingctx: Any,
        totals: Any,
        words: Any,
        row: Any,
        intermediate: Any,
        row_scales: Any,
        values: Any,
        scales: Any,
        group: Any,
        hidden: Any,
        column: Any,
    ) -> Any:
        place = types.intp
        signature = types.void(totals, words, place, place, row_scales, values, scales, place, place, place)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds, (row, intermediate, group, hidden, column) = (
                signature.args,
                (args[2], args[3], args[7], args[8], args[9]),
            )

            def array(i: int, offset: Any) -> Any:
                return element_pointer(context, builder, kinds[i], args[i], offset)

            first = _times(builder, group, 64)
            inputs = array(1, builder.add(builder.mul(row, intermediate), first))
            weights = array(5, builder.add(builder.mul(first, hidden), column))
            sums = [[cgutils.alloca_once(builder, _INTS) for _ in range(vectors)] for _ in range(tokens)]
            for total in (total for line in sums for total in line):
                builder.store(_zeros(), total)
            with cgutils.for_range(builder, ir.Constant(_LONG, 32)) as loop:
                pair = _times(builder, loop.index, 2)
                source = _place(builder, weights, builder.mul(pair, hidden))
                parts = []
                for v in range(vectors):
                    even = load_as(builder, _place(builder, source, v * WIDTH), ir.VectorType(_BYTE, WIDTH), 1)
                    odd = load_as(builder, _place(builder, source, v * WIDTH, hidden), even.type, 1)
                    order = [lane for i in range(WIDTH) for lane in (i, WIDTH + i)]
                    mixed = builder.shuffle_vector(even, odd, ir.Constant(ir.VectorType(_INT, 2 * WIDTH), order))
                    parts.append(builder.sext(mixed, _WORDS))
                for t, line in enumerate(sums):
                    both = load_as(builder, _place(builder, inputs, pair, _times(builder, intermediate, t)), _INT, 2)
                    lane = builder.insert_element(ir.Constant(_INTS, ir.Undefined), both, ir.Constant(_INT, 0))
                    factor = builder.bitcast(_lanes(builder, lane, [0] * WIDTH), _WORDS)
                    for part, total in zip(parts, line, strict=True):
                        builder.store(multiply_words(builder, builder.load(total), part, factor), total)
            groups = builder.udiv(intermediate, ir.Constant(_LONG, 64))
            neuron_scales = array(6, builder.add(builder.mul(group, hidden), column))
            for t, line in enumerate(sums):
                own = builder.add(row, ir.Constant(_LONG, t))
                factor = builder.load(array(4, builder.add(builder.mul(own, groups), group)))
                for v, total in enumerate(line):
                    target = _place(builder, array(0, builder.mul(own, hidden)), column, v * WIDTH)
                    whole = builder.sitofp(builder.load(total), _FLOATS)
                    add_scaled(builder, target, whole, _place(builder, neuron_scales, v * WIDTH), factor)
            return context.get_dummy_value()

        return signature, codegen

    return add_group


# Columns of one token row, and of several, whose sums stay in registers.
COLUMNS_ALONE, COLUMNS_TOGETHER = 64, 32 if has_avx512() else 16
# totals[r * hidden + k] += (sum over the neurons j of a group of words[r, j] * values[j, k]) * (scales[group, k] *
# row_scales[r, group]), for token rows r from `row` on and so many columns k from `column` on.
add_group_alone = _make_add_group(1, COLUMNS_ALONE // WIDTH)
add_group_together = _make_add_group(TOKENS, COLUMNS_TOGETHER // WIDTH)
