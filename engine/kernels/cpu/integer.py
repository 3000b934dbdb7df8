"""Products with quantised weights by AMX, `product` and `multiply_down`, and without zeros, `skip_down`.

See `quantised` for the weights and `integer_rows` for token rows, whose two parts AMX multiplies by int8 apart. The
sums of a group are exact integers; float32 sums then take in the scales of weight and token row, group after group.
Without AMX, `integer_plain` comes to the same integers.
"""

from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload
from numpy.typing import NDArray

from engine.kernels.cpu.aligned import CACHE_LINE
from engine.kernels.cpu.down import (
    AHEAD,
    NEURON_PARTS,
    add_in_order,
    column_unit,
    fetch_active,
    hidden_place,
    mark_active,
    multiply_down,
    neuron_parts,
    skip_down,
)
from engine.kernels.cpu.integer_rows import WORD, IntegerHidden, IntegerRows, PlainIntegerHidden
from engine.kernels.cpu.integer_simd import (
    LOW_BITS,
    add_column,
    add_integers,
    add_minima,
    add_tile,
    dot_int4,
    dot_int8,
    widen_int4,
)
from engine.kernels.cpu.integer_words import LISTED, add_neurons
from engine.kernels.cpu.options import INNER
from engine.kernels.cpu.product import BLOCK, is_kind, product, tile_columns, unpack_tile
from engine.kernels.cpu.quantised import INT4_GROUP, INT8_GROUP, NEURONS, Int4Weight
from engine.kernels.cpu.rows import interleave4, prefetch
from engine.kernels.cpu.tiles import ROW_BYTES, ROWS, clear, load, multiply_int8, store, tile_config

Array = NDArray[Any]


def integer_tiles(columns: int, group: int) -> NDArray[np.uint8]:
    """Shapes of tiles for `product`: 0 to 3 are sums [16 neurons, columns], 4 and 5 weights, 6 and 7 token rows."""
    width = 4 * columns
    weights, inputs = (ROWS, group), (group // WORD, width)
    return tile_config({**dict.fromkeys(range(4), (ROWS, width)), 4: weights, 5: weights, 6: inputs, 7: inputs})


def integer_down_tiles(rows: int) -> NDArray[np.uint8]:
    """Shapes of tiles for `multiply_down`: 0 to 3 are sums [rows, 16 columns], 4 and 5 token rows, 6 and 7 weights."""
    height = tile_columns(rows)
    sums, weights = (height, ROW_BYTES), (ROWS, ROW_BYTES)
    return tile_config({**dict.fromkeys(range(6), sums), 6: weights, 7: weights})


@overload(product)
def _product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    if is_kind(inputs, IntegerRows):
        return _int4_product if is_kind(weights, Int4Weight) else _int8_product
    return None


# What a thread's float32 scratch holds during a product with AMX.
_SUMS, _WIDE = 1024, 1536  # sums [32][16] behind counts [high, low][32][16]; then 4-bit values, widened


@njit(**INNER)
def _multiply_group(inputs, at, columns, weights, upper, lower, stride, counts):  # type: ignore[no-untyped-def]
    """One group of 32 neurons with the token rows of a tile: integers [2 halves][high, low][16][16]."""
    clear(0)
    clear(1)
    clear(2)
    clear(3)
    load(6, inputs.high, at, 4 * columns)
    load(4, weights, upper, stride)
    multiply_int8(0, 4, 6)
    load(7, inputs.low, at, 4 * columns)
    multiply_int8(1, 4, 7)
    load(5, weights, lower, stride)
    multiply_int8(2, 5, 6)
    multiply_int8(3, 5, 7)
    store(0, counts, 0, ROW_BYTES)
    store(1, counts, 256, ROW_BYTES)
    store(2, counts, 512, ROW_BYTES)
    store(3, counts, 768, ROW_BYTES)


@njit(**INNER)
def _add_group(inputs, inputs_at, weights, groups, group, neuron, counts, sums):  # type: ignore[no-untyped-def]
    """Take a group's integers into `sums` [32][16]."""
    for half in range(2):
        at = ((neuron // NEURONS + half) * groups + group) * NEURONS
        high, low = half * 512, half * 512 + 256
        add_tile(sums, half * 256, counts, high, counts, low, weights.scales, at, inputs.scales, inputs_at)


@njit(**INNER)
def _finish(count, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    """Sums [32 neurons][16 token rows] to `count` rows of `out`."""
    unpack_tile(scratch, _SUMS, count, out, at, stride)
    unpack_tile(scratch, _SUMS + 256, count, out, at + ROWS, stride)


def _int8_product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    groups, words, values = size // INT8_GROUP, size // WORD, weights.values
    if rows == 1:
        for half in range(0, BLOCK, NEURONS):
            row = neuron + half
            dot_int8(
                out,
                at + half,
                inputs.high,
                inputs.low,
                inputs.scales,
                ROWS,
                values,
                row * size,
                size,
                weights.scales,
                row * groups,
            )
        return
    columns, upper, lower = min(rows, ROWS), neuron * size, (neuron + NEURONS) * size
    counts, sums = scratch[:_SUMS].view(np.int32), scratch[_SUMS:_WIDE]
    for row in range(first, last, ROWS):
        tile, target = row // ROWS, at + (row - first) * stride
        sums[:] = 0
        for g in range(groups):
            if row == 0:
                for line in range(BLOCK):
                    prefetch(values, upper + BLOCK * size + (g * BLOCK + line) * CACHE_LINE)
            place = (tile * words + g * (INT8_GROUP // WORD)) * columns
            begin = g * INT8_GROUP
            _multiply_group(inputs, place, columns, values, upper + begin, lower + begin, size, counts)
            _add_group(inputs, (tile * groups + g) * ROWS, weights, groups, g, neuron, counts, sums)
        _finish(last - row, out, target, stride, scratch)


def _int4_product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    groups, words, half, values = size // INT4_GROUP, size // WORD, size // 2, weights.values
    if rows == 1:
        for side in range(0, BLOCK, NEURONS):
            row = neuron + side
            dot_int4(
                out,
                at + side,
                inputs.high,
                inputs.low,
                inputs.scales,
                inputs.sums,
                ROWS,
                values,
                row * half,
                size,
                weights.scales,
                weights.minima,
                row * groups,
            )
        return
    columns = min(rows, ROWS)
    counts, sums = scratch[:_SUMS].view(np.int32), scratch[_SUMS:_WIDE]
    wide = scratch[_WIDE : _WIDE + 512].view(np.uint8)  # [2 groups][32 neurons][32]
    for row in range(first, last, ROWS):
        tile, target = row // ROWS, at + (row - first) * stride
        sums[:] = 0
        for pair in range(groups // 2):
            if row == 0:
                for line in range(BLOCK // 2):
                    prefetch(values, (neuron + BLOCK) * half + (pair * (BLOCK // 2) + line) * CACHE_LINE)
            for n in range(BLOCK):
                widen_int4(values, (neuron + n) * half + pair * INT4_GROUP, wide, n * INT4_GROUP, BLOCK * INT4_GROUP)
            for which in range(2):
                g = 2 * pair + which
                place, upper = (tile * words + g * (INT4_GROUP // WORD)) * columns, which * BLOCK * INT4_GROUP
                lower = upper + NEURONS * INT4_GROUP
                _multiply_group(inputs, place, columns, wide, upper, lower, INT4_GROUP, counts)
                inputs_at = (tile * groups + g) * ROWS
                _add_group(inputs, inputs_at, weights, groups, g, neuron, counts, sums)
                for side in range(2):
                    minima_at = ((neuron // NEURONS + side) * groups + g) * NEURONS
                    add_minima(sums, side * 256, weights.minima, minima_at, inputs.sums, inputs_at)
        _finish(last - row, out, target, stride, scratch)


@overload(column_unit)
def _column_unit(h):  # type: ignore[no-untyped-def]
    if is_kind(h, IntegerHidden):
        return lambda h: INT8_GROUP
    return (lambda h: BLOCK) if is_kind(h, PlainIntegerHidden) else None


@overload(neuron_parts)
def _neuron_parts(h):  # type: ignore[no-untyped-def]
    if is_kind(h, IntegerHidden):
        return lambda h: 1
    return (lambda h: NEURON_PARTS) if is_kind(h, PlainIntegerHidden) else None


@overload(multiply_down)
def _multiply_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, panel, out):  # type: ignore[no-untyped-def]
    return _int8_down if is_kind(h, IntegerHidden) else None


def _int8_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, panel, out):  # type: ignore[no-untyped-def]
    height, groups, values = min(rows, ROWS), intermediate // INT8_GROUP, down.values
    counts = panel[1024:3072].view(np.int32)  # [row][pair of 16 columns][high, low][32]
    for r in range(rows):
        totals[r * hidden + first : r * hidden + last] = 0
    for g in range(begin // INT8_GROUP, end // INT8_GROUP):
        for k in range(first, last, INT8_GROUP):
            for quad in range(ROWS):
                at = (g * INT8_GROUP + WORD * quad) * hidden + k
                prefetch(values, at + INT8_GROUP * hidden)
                prefetch(values, at + (INT8_GROUP + 1) * hidden)
                prefetch(values, at + (INT8_GROUP + 2) * hidden)
                prefetch(values, at + (INT8_GROUP + 3) * hidden)
                interleave4(panel, quad * ROWS, 256, values, at, hidden)
            for row in range(0, rows, height):
                at = row * intermediate + g * INT8_GROUP * ROWS
                load(4, h.high, at, ROW_BYTES)
                load(5, h.low, at, ROW_BYTES)
                for pair in range(2):
                    clear(0)
                    clear(1)
                    clear(2)
                    clear(3)
                    load(6, panel, pair * 512, ROW_BYTES)
                    load(7, panel, pair * 512 + 256, ROW_BYTES)
                    multiply_int8(0, 4, 6)
                    multiply_int8(1, 5, 6)
                    multiply_int8(2, 4, 7)
                    multiply_int8(3, 5, 7)
                    place = pair * 64
                    store(0, counts, place, 512)
                    store(1, counts, place + 32, 512)
                    store(2, counts, place + 16, 512)
                    store(3, counts, place + 48, 512)
                for r in range(row, min(row + height, rows)):
                    factor = h.scales[r * groups + g]
                    for pair in range(2):
                        place, column = (r - row) * 128 + pair * 64, k + pair * 32
                        for c in range(0, 32, NEURONS):
                            high, low = place + c, place + 32 + c
                            scales_at = g * hidden + column + c
                            add_column(
                                totals,
                                r * hidden + column + c,
                                counts,
                                high,
                                counts,
                                low,
                                down.scales,
                                scales_at,
                                factor,
                            )
    add_in_order(totals, rows, hidden, first, last, down, out)


@overload(mark_active)
def _mark_active(h, rows, intermediate, tile, marks):  # type: ignore[no-untyped-def]
    if is_kind(h, IntegerHidden):

        def mark_tiles(h, rows, intermediate, tile, marks):  # type: ignore[no-untyped-def]
            marks[:] = 0
            for r in range(rows):
                at = hidden_place(r, tile, intermediate, INT8_GROUP)
                for j in range(marks.size):
                    marks[j] |= (h.high[at + j] | h.low[at + j]) != 0

        return mark_tiles
    if is_kind(h, PlainIntegerHidden):

        def mark_rows(h, rows, intermediate, tile, marks):  # type: ignore[no-untyped-def]
            marks[:] = 0
            for r in range(rows):
                for j in range(marks.size):
                    marks[j] |= h.values[r * intermediate + tile + j] != 0

        return mark_rows
    return None


@overload(skip_down)
def _skip_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, places, factors, out):  # type: ignore[no-untyped-def]
    if not (is_kind(h, IntegerHidden) or is_kind(h, PlainIntegerHidden)):
        return None

    def skip(h, rows, intermediate, down, hidden, begin, end, first, last, totals, places, factors, out):  # type: ignore[no-untyped-def]
        groups, whole = intermediate // INT8_GROUP, factors[:INT8_GROUP].view(np.int16)
        counts = np.empty(last - first, np.int32)
        marks = np.empty(INT8_GROUP, np.uint8)
        for r in range(rows):
            totals[r * hidden + first : r * hidden + last] = 0
        for g in range(begin // INT8_GROUP, end // INT8_GROUP):
            fetch_active(h, rows, intermediate, g * INT8_GROUP + AHEAD, marks, down.values, hidden, first, last)
            for r in range(rows):
                count = 0
                for j in range(g * INT8_GROUP, (g + 1) * INT8_GROUP):
                    value = hidden_integer(h, r, j, intermediate)
                    places[count], whole[count] = j, value
                    count += value != 0
                for i in range(count, count + LISTED - 1):  # the last ones are taken together with zeros
                    places[i], whole[i] = places[0], 0
                if count > 0:
                    counts[:] = 0
                    for i in range(0, count, LISTED):
                        add_neurons(counts, whole, i, down.values, first, places, i, hidden, last - first)
                    factor = h.scales[r * groups + g]
                    for c in range(0, last - first, NEURONS):
                        scales_at = g * hidden + first + c
                        add_integers(totals, r * hidden + first + c, counts, c, down.scales, scales_at, factor)
        add_in_order(totals, rows, hidden, first, last, down, out)

    return skip


def hidden_integer(h, row, j, intermediate):  # type: ignore[no-untyped-def]
    """The integer of neuron j in a row of h (for use in kernels only)."""
    raise NotImplementedError


@overload(hidden_integer)
def _hidden_integer(h, row, j, intermediate):  # type: ignore[no-untyped-def]
    if is_kind(h, IntegerHidden):
        return _joined_integer
    return lambda h, row, j, intermediate: np.int32(h.values[row * intermediate + j])


def _joined_integer(h, row, j, intermediate):  # type: ignore[no-untyped-def]
    at = hidden_place(row, j, intermediate, INT8_GROUP)
    return np.int32(np.int32(h.high[at]) * np.int32(1 << LOW_BITS) + np.int32(h.low[at]))
