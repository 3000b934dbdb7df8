"""Products of 16-bit integers where AMX is missing, and with them the product by `down`: vector loops in LLVM IR.

Integers of a token row, 15 bits and a sign, meet sign-extended weights two by two: each lane takes the sum of two
products into 32 bits. AVX-512 with VNNI, AVX-512 and AVX2 have instructions for that; elsewhere LLVM finds its own.
A group's sums are exact, so neither their order nor the instruction matters; groups are added in order, as float32.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from engine.kernels.cpu.integer_simd import add_scaled
from engine.kernels.cpu.isa import features, has_avx512
from engine.kernels.cpu.simd import advance, element_pointer, load_as, store_as, times

# Lanes of a sum: those of one register.
WIDTH = 16 if has_avx512() else 8
# Token rows that share what is made of weights.
TOKENS = 4

_INT, _LONG, _BYTE, _SHORT = ir.IntType(32), ir.IntType(64), ir.IntType(8), ir.IntType(16)
_INTS, _FLOATS = ir.VectorType(_INT, WIDTH), ir.VectorType(ir.FloatType(), WIDTH)
_WORDS, _BYTES = ir.VectorType(_SHORT, 2 * WIDTH), ir.VectorType(_BYTE, 2 * WIDTH)


def _lanes(builder: Any, vector: Any, places: Any) -> Any:
    places = list(places)
    return builder.shuffle_vector(
        vector, ir.Constant(vector.type, ir.Undefined), ir.Constant(ir.VectorType(_INT, len(places)), places)
    )


def call_llvm(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """What an intrinsic of LLVM makes of vectors, of type `result`."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def multiply_words(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total[i] += a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1]: int32 [8 or 16], and int16 twice as many."""
    kind = total.type
    if kind.count == 16 and "avx512vnni" in features():
        pairs = (builder.bitcast(words, kind) for words in (a, b))
        return call_llvm(builder, "llvm.x86.avx512.vpdpwssd.512", kind, total, *pairs)
    if kind.count == 16 and has_avx512():
        return builder.add(total, call_llvm(builder, "llvm.x86.avx512.pmaddw.d.512", kind, a, b))
    if kind.count == 8 and "avx2" in features():
        return builder.add(total, call_llvm(builder, "llvm.x86.avx2.pmadd.wd", kind, a, b))
    return multiply_words_plainly(builder, total, a, b)


def multiply_words_plainly(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """`multiply_words` for any processor."""
    for parity in range(2):
        lanes = range(parity, 2 * total.type.count, 2)
        wide = (builder.sext(_lanes(builder, words, lanes), total.type) for words in (a, b))
        total = builder.add(total, builder.mul(*wide))
    return total


def _factor_pair(builder: Any, pointer: Any) -> Any:
    """Integers of two neurons of a token row, in each lane of a vector of words."""
    both = load_as(builder, pointer, _INT, 2)
    lane = builder.insert_element(ir.Constant(_INTS, ir.Undefined), both, ir.Constant(_INT, 0))
    return builder.bitcast(_lanes(builder, lane, [0] * WIDTH), _WORDS)


def _weight_pairs(builder: Any, even: Any, odd: Any, first: int) -> Any:
    """`WIDTH` weights each, from lane `first` on, of two neurons as words side by side."""
    lanes, count = range(first, first + WIDTH), even.type.count
    order = [place for lane in lanes for place in (lane, count + lane)]
    mixed = builder.shuffle_vector(even, odd, ir.Constant(ir.VectorType(_INT, 2 * WIDTH), order))
    return builder.sext(mixed, _WORDS)


LISTED = 4  # of `add_neurons`: few rows that are read in turns still come fast from memory
_LINE = 16  # columns of them


@intrinsic
def add_neurons(
    typingctx: Any,
    counts: Any,
    words: Any,
    at: Any,
    values: Any,
    base: Any,
    places: Any,
    places_at: Any,
    hidden: Any,
    columns: Any,
) -> Any:
    """counts[k] += sum over i < 4 of words[at + i] * values[base + places[places_at + i] * hidden + k] for k < columns.

    counts: int32. words: int16, of one token row. values: int8. columns: A multiple of 16.
    """
    place = types.intp
    line = ir.VectorType(_BYTE, _LINE)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        counts = element_pointer(context, builder, kinds[0], args[0], ir.Constant(_LONG, 0))
        words, values, places = (element_pointer(context, builder, kinds[i], args[i], args[i + 1]) for i in (1, 3, 5))
        pairs = range(0, LISTED, 2)
        factors = [_factor_pair(builder, advance(builder, words, pair)) for pair in pairs]
        listed = [builder.load(advance(builder, places, i)) for i in range(LISTED)]
        rows = [advance(builder, values, builder.mul(neuron, args[7])) for neuron in listed]
        with cgutils.for_range(builder, builder.udiv(args[8], ir.Constant(_LONG, _LINE))) as loop:
            column = times(builder, loop.index, _LINE)
            loaded = [load_as(builder, advance(builder, row, column), line, 1) for row in rows]
            for first in range(0, _LINE, WIDTH):
                target = advance(builder, counts, column, first)
                total = load_as(builder, target, _INTS)
                for pair, factor in zip(pairs, factors, strict=True):
                    weights = _weight_pairs(builder, loaded[pair], loaded[pair + 1], first)
                    total = multiply_words(builder, total, weights, factor)
                store_as(builder, total, target)
        return context.get_dummy_value()

    return types.void(counts, words, place, values, place, places, place, place, place), codegen


COLUMNS = 32 if has_avx512() else 16  # of `TOKENS` token rows, whose sums stay in registers
_VECTORS = COLUMNS // WIDTH


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
    """totals[r * hidden + k] += (sum of words[r, j] * values[j, k]) * (scales[group, k] * row_scales[r, group]).

    For `TOKENS` token rows r from `row` on and `COLUMNS` columns k from `column` on, over the neurons j of a group.
    """
    place = types.intp
    signature = types.void(totals, words, place, place, row_scales, values, scales, place, place, place)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds, (row, intermediate, group, hidden, column) = (
            signature.args,
            (args[2], args[3], args[7], args[8], args[9]),
        )

        def array(i: int, offset: Any) -> Any:
            return element_pointer(context, builder, kinds[i], args[i], offset)

        first = times(builder, group, 64)
        inputs = array(1, builder.add(builder.mul(row, intermediate), first))
        weights = array(5, builder.add(builder.mul(first, hidden), column))
        sums = [[cgutils.alloca_once(builder, _INTS) for _ in range(_VECTORS)] for _ in range(TOKENS)]
        for total in (total for line in sums for total in line):
            builder.store(ir.Constant(_INTS, [0] * WIDTH), total)
        with cgutils.for_range(builder, ir.Constant(_LONG, 32)) as loop:
            pair = times(builder, loop.index, 2)
            source = advance(builder, weights, builder.mul(pair, hidden))
            parts = []
            for v in range(_VECTORS):
                even = load_as(builder, advance(builder, source, v * WIDTH), ir.VectorType(_BYTE, WIDTH), 1)
                odd = load_as(builder, advance(builder, source, v * WIDTH, hidden), even.type, 1)
                parts.append(_weight_pairs(builder, even, odd, 0))
            for t, line in enumerate(sums):
                factor = _factor_pair(builder, advance(builder, inputs, pair, times(builder, intermediate, t)))
                for part, total in zip(parts, line, strict=True):
                    builder.store(multiply_words(builder, builder.load(total), part, factor), total)
        groups = builder.udiv(intermediate, ir.Constant(_LONG, 64))
        neuron_scales = array(6, builder.add(builder.mul(group, hidden), column))
        for t, line in enumerate(sums):
            own = builder.add(row, ir.Constant(_LONG, t))
            factor = builder.load(array(4, builder.add(builder.mul(own, groups), group)))
            for v, total in enumerate(line):
                target = advance(builder, array(0, builder.mul(own, hidden)), column, v * WIDTH)
                whole = builder.sitofp(builder.load(total), _FLOATS)
                add_scaled(builder, target, whole, advance(builder, neuron_scales, v * WIDTH), factor)
        return context.get_dummy_value()

    return signature, codegen
