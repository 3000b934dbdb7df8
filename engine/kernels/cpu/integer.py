"""Products with quantised weights: `pack_row`, `product` and `multiply_down` for integers.

See `quantised` for the weights. A token row's values become integers of 15 bits for each group of 64 (or 32), in two
parts, 128 * high + low, which AMX multiplies by int8 apart. The sums of a group are exact integers; float32 sums then
take in the scales of weight and token row, group after group. Without AMX, vector loops come to the same integers.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.extending import overload
from numpy.typing import NDArray

from engine.kernels.cpu.aligned import CACHE_LINE
from engine.kernels.cpu.down import (
    AHEAD,
    add_in_order,
    column_unit,
    fetch_active,
    hidden_place,
    keep_hidden,
    mark_active,
    multiply_down,
    skip_down,
)
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
from engine.kernels.cpu.math import from_bfloat16
from engine.kernels.cpu.options import OPTIONS
from engine.kernels.cpu.product import BLOCK, is_kind, pack_row, product, tile_columns, unpack_tile
from engine.kernels.cpu.quantised import INT4_GROUP, INT8_GROUP, NEURONS, Int4Weight, Int8Down
from engine.kernels.cpu.rows import add_listed_integers, interleave4, prefetch
from engine.kernels.cpu.tiles import ROW_BYTES, ROWS, clear, load, multiply_int8, store, tile_config

Array = NDArray[Any]

LARGEST = np.float32(127 << LOW_BITS)  # integer of a group's largest value
_HALF_LOW = np.int32(1 << (LOW_BITS - 1))
_WORD = 4  # values in a word


class IntegerRows(NamedTuple):
    """Token rows for AMX: words [tiles][in / 4][columns] of four int8, scales and sums [tiles][groups][16]."""

    high: Array  # uint32
    low: Array  # uint32
    scales: Array  # float32
    sums: Array  # float32, sum of a group's values


class PlainIntegerRows(NamedTuple):
    """Token rows without AMX: int16 [rows][in], scales and sums [rows][groups]."""

    values: Array
    scales: Array
    sums: Array


class IntegerHidden(NamedTuple):
    """act(gate) * up for `multiply_down`, in tiles of 16 rows and 64 neurons, see `hidden_place`."""

    high: Array  # int8 [rows16 * intermediate]
    low: Array  # int8
    scales: Array  # float32 [rows16 * intermediate / 64]


class PlainIntegerHidden(NamedTuple):
    """The same without AMX."""

    values: Array  # int16
    scales: Array


def integer_tiles(columns: int, group: int) -> NDArray[np.uint8]:
    """Shapes of tiles for `product`: 0 to 3 are sums [16 neurons, columns], 4 and 5 weights, 6 and 7 token rows."""
    width = 4 * columns
    weights, inputs = (ROWS, group), (group // _WORD, width)
    return tile_config({**dict.fromkeys(range(4), (ROWS, width)), 4: weights, 5: weights, 6: inputs, 7: inputs})


def integer_down_tiles(rows: int) -> NDArray[np.uint8]:
    """Shapes of tiles for `multiply_down`: 0 to 3 are sums [rows, 16 columns], 4 and 5 token rows, 6 and 7 weights."""
    height = tile_columns(rows)
    sums, weights = (height, ROW_BYTES), (ROWS, ROW_BYTES)
    return tile_config({**dict.fromkeys(range(6), sums), 6: weights, 7: weights})


@njit(**OPTIONS)
def _scale_of(x, at, size):  # type: ignore[no-untyped-def]
    """What an integer of a group of values is multiplied by."""
    largest = np.float32(0)
    for k in range(at, at + size):
        largest = max(largest, abs(x[k]))
    return largest / LARGEST


@njit(**OPTIONS)
def _to_integers(x, at, size, scale, out, out_at):  # type: ignore[no-untyped-def]
    """out = x / scale, rounded; returns the sum."""
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    total = np.int32(0)
    for k in range(size):
        whole = np.int32(np.rint(x[at + k] * inverse))
        out[out_at + k] = whole
        total += whole
    return total


@njit(**OPTIONS)
def _split(values, size, high, low, at):  # type: ignore[no-untyped-def]
    """values = 128 * high + low."""
    for k in range(size):
        upper = (np.int32(values[k]) + _HALF_LOW) >> np.int32(LOW_BITS)
        high[at + k] = np.int8(upper)
        low[at + k] = np.int8(np.int32(values[k]) - (upper << np.int32(LOW_BITS)))


def group_size(weights):  # type: ignore[no-untyped-def]
    """Values that share a scale (for use in kernels only)."""
    raise NotImplementedError


@overload(group_size)
def _group_size(weights):  # type: ignore[no-untyped-def]
    if is_kind(weights, Int4Weight):
        return lambda weights: INT4_GROUP
    return lambda weights: INT8_GROUP


def _pack_integer_row(row, x, num_rows, inputs, weights):  # type: ignore[no-untyped-def]
    group = group_size(weights)
    columns, groups, column, tile = min(num_rows, ROWS), x.size // group, row % ROWS, row // ROWS
    values = np.empty(group, np.int16)
    high, low = np.empty(group, np.int8), np.empty(group, np.int8)
    high_words, low_words = high.view(np.uint32), low.view(np.uint32)
    for g in range(groups):
        scale = _scale_of(x, g * group, group)
        total = _to_integers(x, g * group, group, scale, values, 0)
        _split(values, group, high, low, 0)
        place = (tile * groups + g) * ROWS + column
        inputs.scales[place], inputs.sums[place] = scale, np.float32(total) * scale
        at = (tile * (x.size // _WORD) + g * high_words.size) * columns + column
        for w in range(high_words.size):
            inputs.high[at + w * columns], inputs.low[at + w * columns] = high_words[w], low_words[w]


def _pack_plain_integer_row(row, x, num_rows, inputs, weights):  # type: ignore[no-untyped-def]
    group = group_size(weights)
    groups = x.size // group
    for g in range(groups):
        scale = _scale_of(x, g * group, group)
        total = _to_integers(x, g * group, group, scale, inputs.values, row * x.size + g * group)
        inputs.scales[row * groups + g], inputs.sums[row * groups + g] = scale, np.float32(total) * scale


@overload(pack_row)
def _pack_row(row, x, num_rows, inputs, weights):  # type: ignore[no-untyped-def]
    if is_kind(inputs, IntegerRows):
        return _pack_integer_row
    return _pack_plain_integer_row if is_kind(inputs, PlainIntegerRows) else None


@overload(product)
def _product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    if is_kind(inputs, IntegerRows):
        return _int4_product if is_kind(weights, Int4Weight) else _int8_product
    if is_kind(inputs, PlainIntegerRows):
        return _plain_int4_product if is_kind(weights, Int4Weight) else _plain_int8_product
    return None


# What a thread's float32 scratch holds during a product with AMX.
_SUMS, _WIDE = 1024, 1536  # sums [32][16] behind counts [high, low][32][16]; then 4-bit values, widened


@njit(**OPTIONS)
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


@njit(**OPTIONS)
def _add_group(inputs, inputs_at, weights, groups, group, neuron, counts, sums):  # type: ignore[no-untyped-def]
    """Take a group's integers into `sums` [32][16]."""
    for half in range(2):
        at = ((neuron // NEURONS + half) * groups + group) * NEURONS
        high, low = half * 512, half * 512 + 256
        add_tile(sums, half * 256, counts, high, counts, low, weights.scales, at, inputs.scales, inputs_at)


@njit(**OPTIONS)
def _finish(count, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    """Sums [32 neurons][16 token rows] to `count` rows of `out`."""
    unpack_tile(scratch, _SUMS, count, out, at, stride)
    unpack_tile(scratch, _SUMS + 256, count, out, at + ROWS, stride)


def _int8_product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    groups, words, values = size // INT8_GROUP, size // _WORD, weights.values
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
            place = (tile * words + g * (INT8_GROUP // _WORD)) * columns
            begin = g * INT8_GROUP
            _multiply_group(inputs, place, columns, values, upper + begin, lower + begin, size, counts)
            _add_group(inputs, (tile * groups + g) * ROWS, weights, groups, g, neuron, counts, sums)
        _finish(last - row, out, target, stride, scratch)


def _int4_product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    groups, words, half, values = size // INT4_GROUP, size // _WORD, size // 2, weights.values
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
                place, upper = (tile * words + g * (INT4_GROUP // _WORD)) * columns, which * BLOCK * INT4_GROUP
                lower = upper + NEURONS * INT4_GROUP
                _multiply_group(inputs, place, columns, wide, upper, lower, INT4_GROUP, counts)
                inputs_at = (tile * groups + g) * ROWS
                _add_group(inputs, inputs_at, weights, groups, g, neuron, counts, sums)
                for side in range(2):
                    minima_at = ((neuron // NEURONS + side) * groups + g) * NEURONS
                    add_minima(sums, side * 256, weights.minima, minima_at, inputs.sums, inputs_at)
        _finish(last - row, out, target, stride, scratch)


@njit(**OPTIONS)
def _integer_dot(a, a_at, b, b_at, size):  # type: ignore[no-untyped-def]
    total = np.int32(0)
    for k in range(size):
        total += np.int32(a[a_at + k]) * np.int32(b[b_at + k])
    return np.float32(total)


def _plain_int8_product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    groups = size // INT8_GROUP
    for n in range(BLOCK):
        place = (neuron + n) // NEURONS * groups * NEURONS + (neuron + n) % NEURONS
        line = (neuron + n) * size
        for r in range(first, last):
            total = np.float32(0)
            for g in range(groups):
                begin = g * INT8_GROUP
                count = _integer_dot(inputs.values, r * size + begin, weights.values, line + begin, INT8_GROUP)
                total += count * (from_bfloat16(weights.scales[place + g * NEURONS]) * inputs.scales[r * groups + g])
            out[at + (r - first) * stride + n] = total


def _plain_int4_product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    groups = size // INT4_GROUP
    wide = scratch[_WIDE : _WIDE + 512].view(np.uint8)
    for n in range(BLOCK):
        place = (neuron + n) // NEURONS * groups * NEURONS + (neuron + n) % NEURONS
        for pair in range(groups // 2):
            packed = (neuron + n) * (size // 2) + pair * INT4_GROUP
            widen_int4(weights.values, packed, wide, pair * 2 * INT4_GROUP, INT4_GROUP)
        for r in range(first, last):
            total = np.float32(0)
            for g in range(groups):
                count = _integer_dot(inputs.values, r * size + g * INT4_GROUP, wide, g * INT4_GROUP, INT4_GROUP)
                group = r * groups + g
                total += count * (from_bfloat16(weights.scales[place + g * NEURONS]) * inputs.scales[group])
                total += from_bfloat16(weights.minima[place + g * NEURONS]) * inputs.sums[group]
            out[at + (r - first) * stride + n] = total


@overload(keep_hidden)
def _keep_hidden(h, row, intermediate, first, values):  # type: ignore[no-untyped-def]
    if is_kind(h, IntegerHidden):
        return _keep_integers
    return _keep_plain_integers if is_kind(h, PlainIntegerHidden) else None


def _keep_integers(h, row, intermediate, first, values):  # type: ignore[no-untyped-def]
    whole = np.empty(INT8_GROUP, np.int16)
    for at in range(0, values.size, INT8_GROUP):
        scale = _scale_of(values, at, INT8_GROUP)
        _to_integers(values, at, INT8_GROUP, scale, whole, 0)
        _split(whole, INT8_GROUP, h.high, h.low, hidden_place(row, first + at, intermediate, INT8_GROUP))
        h.scales[(row * intermediate + first + at) // INT8_GROUP] = scale


def _keep_plain_integers(h, row, intermediate, first, values):  # type: ignore[no-untyped-def]
    place = row * intermediate + first
    for at in range(0, values.size, INT8_GROUP):
        scale = _scale_of(values, at, INT8_GROUP)
        _to_integers(values, at, INT8_GROUP, scale, h.values, place + at)
        h.scales[(place + at) // INT8_GROUP] = scale


@overload(column_unit)
def _column_unit(down):  # type: ignore[no-untyped-def]
    return (lambda down: INT8_GROUP) if is_kind(down, Int8Down) else None


@overload(multiply_down)
def _multiply_down(h, rows, intermediate, down, hidden, first, last, totals, panel, out):  # type: ignore[no-untyped-def]
    if is_kind(h, IntegerHidden):
        return _int8_down
    return _plain_int8_down if is_kind(h, PlainIntegerHidden) else None


def _int8_down(h, rows, intermediate, down, hidden, first, last, totals, panel, out):  # type: ignore[no-untyped-def]
    height, groups, values = min(rows, ROWS), intermediate // INT8_GROUP, down.values
    counts = panel[1024:3072].view(np.int32)  # [row][pair of 16 columns][high, low][32]
    for r in range(rows):
        totals[r * hidden + first : r * hidden + last] = 0
    for g in range(groups):
        for k in range(first, last, INT8_GROUP):
            for quad in range(ROWS):
                at = (g * INT8_GROUP + _WORD * quad) * hidden + k
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


def _plain_int8_down(h, rows, intermediate, down, hidden, first, last, totals, panel, out):  # type: ignore[no-untyped-def]
    counts, groups = panel[: last - first].view(np.int32), intermediate // INT8_GROUP
    for r in range(rows):
        total = totals[r * hidden + first : r * hidden + last]
        total[:] = 0
        for g in range(groups):
            counts[:] = 0
            for j in range(g * INT8_GROUP, (g + 1) * INT8_GROUP):
                factor = np.int32(h.values[r * intermediate + j])
                line = down.values[j * hidden + first : j * hidden + last]
                if factor != 0:
                    for c in range(line.size):
                        counts[c] += factor * np.int32(line[c])
            scales = down.scales[g * hidden + first : g * hidden + last]
            for c in range(counts.size):
                total[c] += np.float32(counts[c]) * (from_bfloat16(scales[c]) * h.scales[r * groups + g])
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
def _skip_down(h, rows, intermediate, down, hidden, first, last, totals, places, factors, out):  # type: ignore[no-untyped-def]
    if not (is_kind(h, IntegerHidden) or is_kind(h, PlainIntegerHidden)):
        return None

    def skip(h, rows, intermediate, down, hidden, first, last, totals, places, factors, out):  # type: ignore[no-untyped-def]
        groups, whole = intermediate // INT8_GROUP, factors[: INT8_GROUP + 1].view(np.int32)
        counts = np.empty(last - first, np.int32)
        marks = np.empty(INT8_GROUP, np.uint8)
        for r in range(rows):
            totals[r * hidden + first : r * hidden + last] = 0
        for g in range(groups):
            fetch_active(h, rows, intermediate, g * INT8_GROUP + AHEAD, marks, down.values, hidden, first, last)
            for r in range(rows):
                count = 0
                for j in range(g * INT8_GROUP, (g + 1) * INT8_GROUP):
                    value = hidden_integer(h, r, j, intermediate)
                    places[count], whole[count] = j, value
                    count += value != 0
                if count > 0:
                    add_listed_integers(counts, whole, places, count, down.values, first, hidden, last - first)
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
