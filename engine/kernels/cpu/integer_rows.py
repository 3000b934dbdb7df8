"""Token rows and act(gate) * up as integers that meet quantised weights: layouts, `pack_row` and `keep_hidden`.

The values of each group of 64 (or 32) become integers of 15 bits and a sign with one scale. AMX takes them in two parts
of int8, 128 * high + low, and so do vector loops of 4-bit weights; those of 8 bits take them whole, as int16.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray

from engine.kernels.cpu.down import hidden_place, keep_hidden
from engine.kernels.cpu.integer_simd import LOW_BITS, ROUNDED, largest_of, round_values, split_values
from engine.kernels.cpu.options import INNER
from engine.kernels.cpu.product import is_kind, pack_row, rows_together
from engine.kernels.cpu.quantised import INT4_GROUP, INT8_GROUP, Int4Weight, PlainIntegerWeight
from engine.kernels.cpu.simd import bits_to_float
from engine.kernels.cpu.tiles import ROWS

Array = NDArray[Any]

LARGEST = np.float32(127 << LOW_BITS)  # integer of a group's largest value
WORD = 4  # values in a word


class IntegerRows(NamedTuple):
    """Token rows for AMX: words [tiles][in / 4][columns] of four int8, scales and sums [tiles][groups][16]."""

    high: Array  # uint32
    low: Array  # uint32
    scales: Array  # float32
    sums: Array  # float32, sum of a group's values


class PlainIntegerRows(NamedTuple):
    """Token rows without AMX, in the order of the weights' rows; scales and sums [rows][groups]."""

    values: Array  # int16 [rows][in] for int8, int8 [rows][high, low][in] for int4
    order: Array  # int32 [in * bytes of a value / 4], see `lane_order`
    scales: Array  # float32
    sums: Array  # float32


class IntegerHidden(NamedTuple):
    """act(gate) * up for `multiply_down`, in tiles of 16 rows and 64 neurons, see `hidden_place`."""

    high: Array  # int8 [rows16 * intermediate]
    low: Array  # int8
    scales: Array  # float32 [rows16 * intermediate / 64]


class PlainIntegerHidden(NamedTuple):
    """The same without AMX."""

    values: Array  # int16
    scales: Array


@njit(**INNER)
def _scale_of(x, at, size):  # type: ignore[no-untyped-def]
    """What an integer of a group of values is multiplied by."""
    largest = np.int32(0)  # as bits, which order like floats and keep a NaN, where a comparison of floats need not
    for k in range(at, at + size, ROUNDED):
        largest = max(largest, largest_of(x, k))
    return bits_to_float(np.uint32(largest)) / LARGEST


@njit(**INNER)
def _to_integers(x, at, size, scale, out, out_at):  # type: ignore[no-untyped-def]
    """out = x / scale, rounded; returns the sum."""
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    total = np.int32(0)
    for k in range(0, size, ROUNDED):
        total += round_values(x, at + k, inverse, out, out_at + k)
    return total


@njit(**INNER)
def _split(values, size, high, low, at):  # type: ignore[no-untyped-def]
    """values = 128 * high + low."""
    for k in range(0, size, ROUNDED):
        split_values(values, k, high, low, at + k)


def group_size(weights):  # type: ignore[no-untyped-def]
    """Values that share a scale (for use in kernels only)."""
    raise NotImplementedError


@overload(group_size)
def _group_size(weights):  # type: ignore[no-untyped-def]
    int4 = is_kind(weights, Int4Weight) or (is_kind(weights, PlainIntegerWeight) and weights[0].dtype == types.uint8)
    group = INT4_GROUP if int4 else INT8_GROUP
    return lambda weights: group


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
        at = (tile * (x.size // WORD) + g * high_words.size) * columns + column
        for w in range(high_words.size):
            inputs.high[at + w * columns], inputs.low[at + w * columns] = high_words[w], low_words[w]


@njit(**INNER)
def _group_plain_row(row, x, inputs, group):  # type: ignore[no-untyped-def]
    """The integers of a row, int16, in its own order; sets its scales and sums."""
    groups, whole = x.size // group, np.empty(x.size, np.int16)
    for g in range(groups):
        scale = _scale_of(x, g * group, group)
        total = _to_integers(x, g * group, group, scale, whole, g * group)
        inputs.scales[row * groups + g], inputs.sums[row * groups + g] = scale, np.float32(total) * scale
    return whole


@njit(**INNER)
def _put_in_order(whole, order, out, first):  # type: ignore[no-untyped-def]
    """Words of 32 bits, which hold a unit of values each."""
    for k in range(order.size):
        out[first + k] = whole[order[k]]


def _pack_words(row, x, num_rows, inputs, weights):  # type: ignore[no-untyped-def]
    whole = _group_plain_row(row, x, inputs, group_size(weights)).view(np.uint32)
    _put_in_order(whole, inputs.order, inputs.values.view(np.uint32), row * whole.size)


def _pack_bytes(row, x, num_rows, inputs, weights):  # type: ignore[no-untyped-def]
    whole = _group_plain_row(row, x, inputs, group_size(weights))
    high, low = np.empty(x.size, np.int8), np.empty(x.size, np.int8)
    _split(whole, x.size, high, low, 0)
    words, size = inputs.values.view(np.uint32), inputs.order.size
    _put_in_order(high.view(np.uint32), inputs.order, words, 2 * row * size)
    _put_in_order(low.view(np.uint32), inputs.order, words, (2 * row + 1) * size)


@overload(pack_row)
def _pack_row(row, x, num_rows, inputs, weights):  # type: ignore[no-untyped-def]
    if is_kind(inputs, IntegerRows):
        return _pack_integer_row
    if is_kind(inputs, PlainIntegerRows):
        return _pack_words if inputs[0].dtype == types.int16 else _pack_bytes
    return None


@overload(rows_together)
def _rows_together(inputs):  # type: ignore[no-untyped-def]
    if is_kind(inputs, IntegerRows):
        return lambda inputs: ROWS
    return (lambda inputs: 1) if is_kind(inputs, PlainIntegerRows) else None


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
