"""Products with rows of weights for Numba, where AMX is missing or rows are few and scattered: vector loops in LLVM IR.

Rows are read 32 values at a time as two vectors of 16 float32. A bfloat16 is the upper half of a float32, so of 32
bfloat16 seen as 16 integers one shift gives the even ones and one mask the odd ones. Vectors that meet such rows have
the same order: evens and odds of each 32 apart, see `place_of`. Rows of float32 stay as they are.

Every function adds its terms in one fixed order that depends on the size alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from engine.kernels.cpu.aligned import CACHE_LINE
from engine.kernels.cpu.isa import has_avx512
from engine.kernels.cpu.options import INNER, OPTIONS
from engine.kernels.cpu.simd import (
    LANES,
    alternate,
    element_pointer,
    horizontal_sum,
    load_as,
    multiply_add,
    narrowed,
    pair_up,
    prefetch_line,
    splat,
    store_as,
)

CHUNK = 2 * LANES  # what a size must be a multiple of
FEW = 2  # token rows whose sums over neurons are taken together where there are no more of them
FETCHED = 8  # rows of weights from the one at hand to the one that is fetched

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_LONG = ir.IntType(64)
_FIRST = ir.Constant(_LONG, 0)


def place_of(k, weights):  # type: ignore[no-untyped-def]
    """Where element k of a vector lies that meets rows of `weights` (for use in kernels only)."""
    raise NotImplementedError


@overload(place_of)
def _place_of(k, weights):  # type: ignore[no-untyped-def]
    if getattr(weights, "dtype", None) != types.uint16:
        return lambda k, weights: k
    return lambda k, weights: (k & ~31) | ((k & 1) << 4) | ((k & 31) >> 1)


def _constant(value: int) -> Any:
    return ir.Constant(_INTS, [value] * LANES)


def _load_chunk(builder: Any, pointer: Any, dtype: Any) -> tuple[Any, Any]:
    """32 weights as two vectors."""
    if dtype == types.float32:
        second = builder.gep(pointer, [ir.Constant(_LONG, LANES)])
        return load_as(builder, pointer, _VECTOR, 4), load_as(builder, second, _VECTOR, 4)
    pairs = load_as(builder, pointer, _INTS, 2)
    even = builder.bitcast(builder.shl(pairs, _constant(16)), _VECTOR)
    odd = builder.bitcast(builder.and_(pairs, _constant(-65536)), _VECTOR)
    return even, odd


def _weight_pointers(builder: Any, base: Any, places: Any, count: int, size: Any) -> list[Any]:
    """Address of row places[i] of `size` elements, for i < count."""
    return [
        builder.gep(base, [builder.mul(builder.load(builder.gep(places, [ir.Constant(_LONG, i)])), size)])
        for i in range(count)
    ]


# Lanes of a sum in the products below: one vector register, where `LANES` may take two.
_SUM_LANES = 16 if has_avx512() else 8
_SUM, _SUM_INTS = ir.VectorType(_FLOAT, _SUM_LANES), ir.VectorType(_INT, _SUM_LANES)


def _parts(builder: Any, pointer: Any, dtype: Any) -> list[tuple[int, Callable[[], Any]]]:
    """32 weights in vectors of a sum's lanes: where in the 32 values each meets lies, and how it is loaded."""

    def load(kind: Any, at: int, align: int) -> Any:
        return load_as(builder, builder.gep(pointer, [ir.Constant(_LONG, at)]), kind, align)

    def even(at: int) -> Any:
        pairs = load(_SUM_INTS, 2 * at, 2)
        return builder.bitcast(builder.shl(pairs, ir.Constant(_SUM_INTS, [16] * _SUM_LANES)), _SUM)

    def odd(at: int) -> Any:
        pairs = load(_SUM_INTS, 2 * at, 2)
        return builder.bitcast(builder.and_(pairs, ir.Constant(_SUM_INTS, [-65536] * _SUM_LANES)), _SUM)

    if dtype == types.float32:
        return [(at, partial(load, _SUM, at, 4)) for at in range(0, CHUNK, _SUM_LANES)]
    halves = range(0, LANES, _SUM_LANES)
    return [part for at in halves for part in ((at, partial(even, at)), (LANES + at, partial(odd, at)))]


def _prefetch_chunk(builder: Any, pointer: Any, dtype: Any) -> None:
    """Fetch 32 weights."""
    for element in range(0, CHUNK, CACHE_LINE * 8 // dtype.bitwidth):
        prefetch_line(builder, builder.gep(pointer, [ir.Constant(_LONG, element)]))


def make_dots(num_rows: int, num_vectors: int, *, fetch: bool) -> Any:
    """Intrinsic for `num_vectors` vectors with `num_rows` rows of weights, all sums in registers.

    With `fetch`, what the places after these name is fetched meanwhile.
    """

    @intrinsic
    def dots(
        typingctx: Any,
        out: Any,
        out_at: Any,
        out_stride: Any,
        x: Any,
        x_at: Any,
        x_stride: Any,
        weights: Any,
        base: Any,
        places: Any,
        places_at: Any,
        size: Any,
    ) -> Any:
        integer = types.intp
        signature = types.void(out, integer, integer, x, integer, integer, weights, integer, places, integer, integer)
        dtype = weights.dtype

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            out_pointer = element_pointer(context, builder, kinds[0], args[0], args[1])
            x_pointer = element_pointer(context, builder, kinds[3], args[3], args[4])
            weights_base = element_pointer(context, builder, kinds[6], args[6], args[7])
            places_pointer = element_pointer(context, builder, kinds[8], args[8], args[9])
            size = args[10]
            rows = _weight_pointers(builder, weights_base, places_pointer, num_rows, size)
            next_rows = []
            if fetch:
                next_places = builder.gep(places_pointer, [ir.Constant(_LONG, FETCHED)])
                next_rows = _weight_pointers(builder, weights_base, next_places, num_rows, size)
            vectors = [
                builder.gep(x_pointer, [builder.mul(args[5], ir.Constant(_LONG, v))]) for v in range(num_vectors)
            ]
            sums = [[cgutils.alloca_once(builder, _SUM) for _ in rows] for _ in vectors]
            for line in sums:
                for total in line:
                    builder.store(ir.Constant(_SUM, [0.0] * _SUM_LANES), total)
            with cgutils.for_range(builder, builder.udiv(size, ir.Constant(_LONG, CHUNK))) as loop:
                at = builder.mul(loop.index, ir.Constant(_LONG, CHUNK))
                for row in next_rows:
                    _prefetch_chunk(builder, builder.gep(row, [at]), dtype)
                by_row = [_parts(builder, builder.gep(row, [at]), dtype) for row in rows]
                for same_part in zip(*by_row, strict=True):
                    place = builder.add(at, ir.Constant(_LONG, same_part[0][0]))
                    loaded = [load() for _, load in same_part]
                    for vector, line in zip(vectors, sums, strict=True):
                        values = load_as(builder, builder.gep(vector, [place]), _SUM, 4)
                        for part, total in zip(loaded, line, strict=True):
                            builder.store(multiply_add(builder, part, values, builder.load(total)), total)
            for v, line in enumerate(sums):
                start = builder.mul(args[2], ir.Constant(_LONG, v))
                for n, total in enumerate(line):
                    place = builder.add(start, ir.Constant(_LONG, n))
                    value = horizontal_sum(builder, builder.load(total))
                    builder.store(value, builder.gep(out_pointer, [place]))
            return context.get_dummy_value()

        return signature, codegen

    return dots


# What comes first reads weights from memory, which is fastest in order: one neuron after another meets up to `ORDERED`
# token rows. Weights that are in a cache already meet other rows by several neurons, whose sums leave enough of the
# vector registers, 16 or 32 with AVX-512, for two parts of each neuron's weights, which LLVM loads at once, and one of
# a token row; and a single row, which would wait for its own additions.
ORDERED, NEURONS, TOKENS = (4, 4, 4) if has_avx512() else (6, 2, 5)
CACHED = 4
SUMMED = 6  # token rows whose sums over neurons are taken together, each in two registers
_DOTS_1, _DOTS_2, _DOTS_3, _DOTS_4, _DOTS_5, _DOTS_6 = (make_dots(1, vectors, fetch=True) for vectors in range(1, 7))
dots_together, dots_cached = make_dots(NEURONS, TOKENS, fetch=False), make_dots(CACHED, 1, fetch=False)


@njit(**INNER)
def dots_in_order(vectors, neurons, out, at, stride, x, x_at, x_stride, weights, base, places, places_at, size):  # type: ignore[no-untyped-def]
    """out[at + v * stride + n] = dot(x[x_at + v * x_stride :], weights[base + places[places_at + n] * size :]).

    For v < vectors <= 6 and n < neurons; both of `size` elements. Fetches `FETCHED` places ahead.
    """
    if vectors == 1:
        for n in range(neurons):
            _DOTS_1(out, at + n, stride, x, x_at, x_stride, weights, base, places, places_at + n, size)
    elif vectors == 2:
        for n in range(neurons):
            _DOTS_2(out, at + n, stride, x, x_at, x_stride, weights, base, places, places_at + n, size)
    elif vectors == 3:
        for n in range(neurons):
            _DOTS_3(out, at + n, stride, x, x_at, x_stride, weights, base, places, places_at + n, size)
    elif vectors == 4:
        for n in range(neurons):
            _DOTS_4(out, at + n, stride, x, x_at, x_stride, weights, base, places, places_at + n, size)
    elif vectors == 5:
        for n in range(neurons):
            _DOTS_5(out, at + n, stride, x, x_at, x_stride, weights, base, places, places_at + n, size)
    else:
        for n in range(neurons):
            _DOTS_6(out, at + n, stride, x, x_at, x_stride, weights, base, places, places_at + n, size)


def _add_rows(num_rows: int) -> Any:
    """Intrinsic that adds `num_rows` scaled rows of weights to a vector, one after another in each element."""

    @intrinsic
    def add_rows(
        typingctx: Any,
        out: Any,
        out_at: Any,
        factors: Any,
        factors_at: Any,
        weights: Any,
        base: Any,
        places: Any,
        places_at: Any,
        stride: Any,
        size: Any,
    ) -> Any:
        integer = types.intp
        signature = types.void(out, integer, factors, integer, weights, integer, places, integer, integer, integer)
        dtype = weights.dtype

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            out_pointer = element_pointer(context, builder, kinds[0], args[0], args[1])
            factors_pointer = element_pointer(context, builder, kinds[2], args[2], args[3])
            weights_base = element_pointer(context, builder, kinds[4], args[4], args[5])
            places_pointer = element_pointer(context, builder, kinds[6], args[6], args[7])
            rows = _weight_pointers(builder, weights_base, places_pointer, num_rows, args[8])
            scales = [
                splat(builder, builder.load(builder.gep(factors_pointer, [ir.Constant(_LONG, i)])))
                for i in range(num_rows)
            ]
            with cgutils.for_range(builder, builder.udiv(args[9], ir.Constant(_LONG, CHUNK))) as loop:
                at = builder.mul(loop.index, ir.Constant(_LONG, CHUNK))
                targets = [builder.gep(out_pointer, [builder.add(at, ir.Constant(_LONG, half))]) for half in (0, LANES)]
                totals = [load_as(builder, target, _VECTOR, 4) for target in targets]
                for row, scale in zip(rows, scales, strict=True):
                    chunk = _load_chunk(builder, builder.gep(row, [at]), dtype)
                    totals = [
                        multiply_add(builder, scale, part, total) for part, total in zip(chunk, totals, strict=True)
                    ]
                for total, target in zip(totals, targets, strict=True):
                    store_as(builder, total, target)
            return context.get_dummy_value()

        return signature, codegen

    return add_rows


add_rows_4 = _add_rows(4)


@intrinsic
def add_row(
    typingctx: Any, out: Any, out_at: Any, factors: Any, factor_at: Any, weights: Any, at: Any, size: Any
) -> Any:
    """out[out_at + k] += factors[factor_at] * weights[at + k] for k < size, in the order of `place_of`."""
    place = types.intp
    signature = types.void(out, place, factors, place, weights, place, place)
    dtype = weights.dtype

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kinds = signature.args
        out, factor, row = (element_pointer(context, builder, kinds[i], args[i], args[i + 1]) for i in (0, 2, 4))
        scale = splat(builder, builder.load(factor), _SUM_LANES)
        with cgutils.for_range(builder, builder.udiv(args[6], ir.Constant(_LONG, CHUNK))) as loop:
            at = builder.mul(loop.index, ir.Constant(_LONG, CHUNK))
            for place, load in _parts(builder, builder.gep(row, [at]), dtype):
                target = builder.gep(out, [builder.add(at, ir.Constant(_LONG, place))])
                store_as(builder, multiply_add(builder, scale, load(), load_as(builder, target, _SUM, 4)), target)
        return context.get_dummy_value()

    return signature, codegen


def _add_scaled(num_rows: int) -> Any:
    """Intrinsic that adds the same 32 columns of scaled rows of weights to several rows, see `add_scaled_alone`."""

    @intrinsic
    def add_scaled(
        typingctx: Any,
        out: Any,
        at: Any,
        out_stride: Any,
        factors: Any,
        factors_at: Any,
        factors_stride: Any,
        weights: Any,
        base: Any,
        stride: Any,
        count: Any,
    ) -> Any:
        place = types.intp
        signature = types.void(out, place, place, factors, place, place, weights, place, place, place)
        dtype = weights.dtype

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            out, factors, weights = (
                element_pointer(context, builder, kinds[i], args[i], args[i + 1]) for i in (0, 3, 6)
            )
            # Of the 32 columns so many at a time that all sums stay in registers.
            parts = CHUNK // _SUM_LANES
            for tile in range(0, parts, 2):
                columns = [column for column, _ in _parts(builder, weights, dtype)[tile : tile + 2]]
                sums = []
                for r in range(num_rows):
                    row = builder.gep(out, [builder.mul(args[2], ir.Constant(_LONG, r))])
                    for column in columns:
                        target = builder.gep(row, [ir.Constant(_LONG, column)])
                        total = cgutils.alloca_once(builder, _SUM)
                        builder.store(load_as(builder, target, _SUM, 4), total)
                        sums.append((total, target))
                with cgutils.for_range(builder, args[9]) as loop:
                    line = builder.gep(weights, [builder.mul(loop.index, args[8])])
                    loaded = [load() for _, load in _parts(builder, line, dtype)[tile : tile + 2]]
                    for r in range(num_rows):
                        own = builder.add(builder.mul(args[5], ir.Constant(_LONG, r)), loop.index)
                        scale = splat(builder, builder.load(builder.gep(factors, [own])), _SUM_LANES)
                        for part, (total, _) in zip(loaded, sums[2 * r :], strict=False):
                            builder.store(multiply_add(builder, scale, part, builder.load(total)), total)
                for total, target in sums:
                    store_as(builder, builder.load(total), target)
            return context.get_dummy_value()

        return signature, codegen

    return add_scaled


# out[at + k] += sum over i < count of factors[i] * weights[base + i * stride + k], k < 32, one after another, in the
# order of `place_of`; and the same for several rows of `out`, each with factors of its own, of one reading of weights.
add_scaled_alone, add_scaled_paired, add_scaled_together = _add_scaled(1), _add_scaled(FEW), _add_scaled(SUMMED)


@intrinsic
def prefetch(typingctx: Any, array: Any, at: Any) -> Any:
    """Fetch the cache line of element `at`, which will be read soon."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        prefetch_line(builder, element_pointer(context, builder, signature.args[0], args[0], args[1]))
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@njit(**OPTIONS)
def fetch(array, at, size):  # type: ignore[no-untyped-def]
    """Fetch the cache lines of array[at : at + size], which will be read soon."""
    line = CACHE_LINE // array.itemsize
    for k in range(at, at + size, line):
        prefetch(array, k)
    if at % line:  # the last one begins within the last step
        prefetch(array, at + size - 1)


@intrinsic
def transpose16(typingctx: Any, source: Any, at: Any, out: Any, out_at: Any, stride: Any) -> Any:
    """out[out_at + i * stride + j] = source[at + 16 j + i] for i and j < 16; the source is read whole before."""
    four = LANES // 4
    quarter = ir.VectorType(_FLOAT, four)

    def join(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(order)), order))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = element_pointer(context, builder, signature.args[0], args[0], args[1])

        def load_four(line: int, column: int) -> Any:
            return load_as(builder, builder.gep(base, [ir.Constant(_LONG, LANES * line + column)]), quarter)

        columns = []
        for column in range(0, LANES, four):
            rows = []  # i: that part of lines i, i + 4, i + 8 and i + 12; loads put them together
            for line in range(four):
                a, b, c, d = (load_four(other, column) for other in range(line, LANES, four))
                lower, upper = (join(builder, *pair, list(range(2 * four))) for pair in ((a, b), (c, d)))
                rows.append(join(builder, lower, upper, list(range(LANES))))
            first = [join(builder, rows[0], rows[1], order) for order in alternate(LANES)]
            second = [join(builder, rows[2], rows[3], order) for order in alternate(LANES)]
            for a, b in zip(first, second, strict=True):
                columns += [join(builder, a, b, order) for order in pair_up(LANES)]
        target = element_pointer(context, builder, signature.args[2], args[2], args[3])
        for i, column in enumerate(columns):
            store_as(builder, column, builder.gep(target, [builder.mul(args[4], ir.Constant(_LONG, i))]))
        return context.get_dummy_value()

    return types.void(source, types.intp, out, types.intp, types.intp), codegen


def _by_lane(size: int, result: Callable[[Any, Any, Any], Any]) -> Any:
    """An intrinsic (out, at, values, values_at): out[at + i] = result of the address of out[at + i] and the value."""

    def typing(typingctx: Any, out: Any, at: Any, values: Any, values_at: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            target, source = (
                element_pointer(context, builder, signature.args[i], args[i], args[i + 1]) for i in (0, 2)
            )
            for lane in range(0, size, LANES):
                place, other = (builder.gep(pointer, [ir.Constant(_LONG, lane)]) for pointer in (target, source))
                store_as(builder, result(builder, place, load_as(builder, other, _VECTOR)), place, 2)
            return context.get_dummy_value()

        return types.void(out, types.intp, values, types.intp), codegen

    return intrinsic(typing)


# out[at + i] += values[values_at + i] for i < 32, all float32, and *= likewise
add_chunk = _by_lane(CHUNK, lambda builder, place, value: builder.fadd(load_as(builder, place, _VECTOR), value))
multiply_chunk = _by_lane(CHUNK, lambda builder, place, value: builder.fmul(load_as(builder, place, _VECTOR), value))


@intrinsic
def add_in_place_order(typingctx: Any, out: Any, at: Any, totals: Any, totals_at: Any, weights: Any) -> Any:
    """out[at + k] += totals[totals_at + place_of(k, weights)] for k < 32."""
    paired = getattr(weights, "dtype", None) == types.uint16

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, source = (element_pointer(context, builder, signature.args[i], args[i], args[i + 1]) for i in (0, 2))
        halves = [builder.gep(source, [ir.Constant(_LONG, half)]) for half in (0, LANES)]
        parts = [load_as(builder, half, _VECTOR) for half in halves]
        if paired:
            order = [place for i in range(LANES) for place in (i, LANES + i)]
            parts = [
                builder.shuffle_vector(*parts, ir.Constant(_INTS, order[half : half + LANES])) for half in (0, LANES)
            ]
        for half, part in zip((0, LANES), parts, strict=True):
            place = builder.gep(target, [ir.Constant(_LONG, half)])
            store_as(builder, builder.fadd(load_as(builder, place, _VECTOR), part), place)
        return context.get_dummy_value()

    return types.void(out, types.intp, totals, types.intp, weights), codegen


# out[at + i] = `math.to_bfloat16` of values[values_at + i] for i < 16, and for i < 32
narrow_vector = _by_lane(LANES, lambda builder, _, value: narrowed(builder, value))
narrow_chunk = _by_lane(CHUNK, lambda builder, _, value: narrowed(builder, value))


@intrinsic
def interleave32(typingctx: Any, out: Any, first_at: Any, second_at: Any, weights: Any, even: Any, odd: Any) -> Any:
    """Pairs (weights[even + i], weights[odd + i]): of i < 16 to out[first_at], of 16 <= i < 32 to out[second_at].

    Weights are bfloat16 bits, pairs uint32 with the even row in the lower half.
    """
    halves = ir.VectorType(ir.IntType(16), CHUNK)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out_pointer = element_pointer(context, builder, signature.args[0], args[0], _FIRST)
        weights_pointer = element_pointer(context, builder, signature.args[3], args[3], _FIRST)
        a, b = (load_as(builder, builder.gep(weights_pointer, [at]), halves, 2) for at in args[4:])
        for at, start in zip(args[1:3], (0, LANES), strict=True):
            order = [place for i in range(start, start + LANES) for place in (i, CHUNK + i)]
            pairs = builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, CHUNK), order))
            target = builder.gep(out_pointer, [at])
            store_as(builder, pairs, target)
        return context.get_dummy_value()

    return types.void(out, types.intp, types.intp, weights, types.intp, types.intp), codegen


@intrinsic
def interleave4(typingctx: Any, out: Any, at: Any, distance: Any, weights: Any, first: Any, stride: Any) -> Any:
    """Fours (weights[first + i], ...[first + stride + i], ...) for i < 64: 16 to out[at], 16 to out[at + distance], ...

    Weights are int8, fours uint32 with the first row in the lowest byte.
    """
    lanes = 64
    line = ir.VectorType(ir.IntType(8), lanes)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out_pointer = element_pointer(context, builder, signature.args[0], args[0], _FIRST)
        weights_pointer = element_pointer(context, builder, signature.args[3], args[3], _FIRST)
        rows = []
        for row in range(4):
            place = builder.add(args[4], builder.mul(args[5], ir.Constant(_LONG, row)))
            rows.append(load_as(builder, builder.gep(weights_pointer, [place]), line, 1))
        for quarter in range(4):
            start = quarter * LANES
            pairs = []
            for a, b in (rows[:2], rows[2:]):
                order = [place for i in range(start, start + LANES) for place in (i, lanes + i)]
                mixed = builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, 2 * LANES), order))
                pairs.append(builder.bitcast(mixed, ir.VectorType(ir.IntType(16), LANES)))
            order = [place for i in range(LANES) for place in (i, LANES + i)]
            fours = builder.shuffle_vector(*pairs, ir.Constant(ir.VectorType(_INT, 2 * LANES), order))
            offset = builder.add(args[1], builder.mul(args[2], ir.Constant(_LONG, quarter)))
            store_as(builder, fours, builder.gep(out_pointer, [offset]))
        return context.get_dummy_value()

    return types.void(out, types.intp, types.intp, weights, types.intp, types.intp), codegen


@intrinsic
def copy64(typingctx: Any, source: Any, source_at: Any, out: Any, out_at: Any, size: Any) -> Any:
    """out[out_at + k] = source[source_at + k] for k < size elements that fill a multiple of 32 bytes."""
    place = types.intp
    width = source.dtype.bitwidth // 8
    line = ir.VectorType(ir.IntType(8), 32)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointers = []
        for i in (0, 2):
            data = element_pointer(context, builder, signature.args[i], args[i], args[i + 1])
            pointers.append(builder.bitcast(data, ir.IntType(8).as_pointer()))
        lines = builder.udiv(builder.mul(args[4], ir.Constant(_LONG, width)), ir.Constant(_LONG, 32))
        with cgutils.for_range(builder, lines) as loop:
            at = builder.mul(loop.index, ir.Constant(_LONG, 32))
            value = load_as(builder, builder.gep(pointers[0], [at]), line, 1)
            store_as(builder, value, builder.gep(pointers[1], [at]), align=1)
        return context.get_dummy_value()

    return types.void(source, place, out, place, place), codegen


def _add_listed(*, paired: bool) -> Any:
    """Intrinsic that adds scaled rows of a list to a vector, see `add_listed_rows` and `add_listed_pairs`."""

    @intrinsic
    def add_listed(
        typingctx: Any,
        totals: Any,
        at: Any,
        factors: Any,
        places: Any,
        split: Any,
        count: Any,
        weights: Any,
        base: Any,
        stride: Any,
        size: Any,
    ) -> Any:
        place = types.intp
        signature = types.void(totals, place, factors, places, place, place, weights, place, place, place)
        dtype = weights.dtype

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            totals = element_pointer(context, builder, kinds[0], args[0], args[1])
            factors, places = (element_pointer(context, builder, kinds[i], args[i], _FIRST) for i in (2, 3))
            weights = element_pointer(context, builder, kinds[6], args[6], args[7])
            zero = ir.Constant(_VECTOR, [0.0] * LANES)
            sums = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(2)] for _ in range(2 if paired else 1)]

            def accumulate(first: Any, last: Any, column: Any, line: Any) -> None:
                with cgutils.for_range(builder, builder.sub(last, first)) as loop:
                    i = builder.add(first, loop.index)
                    scale = splat(builder, builder.load(builder.gep(factors, [i])))
                    row = builder.mul(builder.load(builder.gep(places, [i])), args[8])
                    chunk = _load_chunk(builder, builder.gep(weights, [builder.add(row, column)]), dtype)
                    for part, total in zip(chunk, line, strict=True):
                        builder.store(multiply_add(builder, scale, part, builder.load(total)), total)

            with cgutils.for_range(builder, builder.udiv(args[9], ir.Constant(_LONG, CHUNK))) as loop:
                column = builder.mul(loop.index, ir.Constant(_LONG, CHUNK))
                targets = [builder.gep(totals, [builder.add(column, ir.Constant(_LONG, half))]) for half in (0, LANES)]
                before = [load_as(builder, target, _VECTOR, 4) for target in targets]
                if paired:
                    for total in (total for line in sums for total in line):
                        builder.store(zero, total)
                    accumulate(ir.Constant(_LONG, 0), args[4], column, sums[0])
                    accumulate(args[4], args[5], column, sums[1])
                    after = [
                        builder.fadd(old, builder.fadd(builder.load(even), builder.load(odd)))
                        for old, even, odd in zip(before, *sums, strict=True)
                    ]
                else:
                    for old, total in zip(before, sums[0], strict=True):
                        builder.store(old, total)
                    accumulate(ir.Constant(_LONG, 0), args[5], column, sums[0])
                    after = [builder.load(total) for total in sums[0]]
                for value, target in zip(after, targets, strict=True):
                    store_as(builder, value, target)
            return context.get_dummy_value()

        return signature, codegen

    return add_listed


# totals[at + k] += sum over i < count of factors[i] * weights[base + places[i] * stride + k], one after another.
add_listed_rows = _add_listed(paired=False)
# Likewise in AMX's order: the first `split` on their own, the others on their own, then both together.
add_listed_pairs = _add_listed(paired=True)
