"""Weights to 8 and 4 bits; see `quantised` for what comes of it."""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from engine.kernels.cpu import aligned
from engine.kernels.cpu.math import from_bfloat16, to_bfloat16, widen
from engine.kernels.cpu.options import INNER, OPTIONS
from engine.kernels.cpu.quantised import (
    INT4_GROUP,
    INT4_UNIT,
    INT8_GROUP,
    INT8_UNIT,
    NEURONS,
    Int4Weight,
    Int8Down,
    Int8Weight,
    PlainIntegerWeight,
    lane_order,
)
from engine.kernels.cpu.simd import bits_to_float, float_to_bits
from engine.kernels.cpu.team import launch, usable_threads

_SHARES = np.array([1.0, 0.95, 0.9, 0.85], np.float32)  # of a group's range, to begin with
_REFINEMENTS, _STEPS = 3, np.float32(15)
_WHOLE = np.float32(127)
_NAN = np.uint16(0x7FC0)  # bfloat16 bits
# Bits of float32: of infinity, and of 2**60, from where the squares that a fit adds up may be more than that.
_INFINITY, _TOO_LARGE = np.uint32(0x7F800000), np.uint32((127 + 60) << 23)
_TOGETHER = 32  # groups that are fitted side by side

Array = NDArray[Any]


def quantise_int8(weight: Array, *, amx: bool) -> Int8Weight | PlainIntegerWeight:
    """Quantise [layers, out, in], float32 or bfloat16 bits."""
    layers, rows, size = weight.shape
    values = aligned.empty((layers, rows * size), np.int8)
    scales = aligned.empty((layers, rows * size // INT8_GROUP), np.uint16)
    order = _order(size, INT8_GROUP, INT8_UNIT, amx=amx)
    _round_rows(weight.reshape(-1, size), order, values.reshape(-1, size), scales.reshape(layers * rows, -1))
    if amx:
        return Int8Weight(values, _by_neurons(scales, rows))
    return PlainIntegerWeight(values, scales, scales[:, :0])


def quantise_int4(weight: Array, *, amx: bool) -> Int4Weight | PlainIntegerWeight:
    """Quantise [layers, out, in], float32 or bfloat16 bits."""
    layers, rows, size = weight.shape
    values = aligned.empty((layers, rows * size // 2), np.uint8)
    scales, minima = (aligned.empty((layers, rows * size // INT4_GROUP), np.uint16) for _ in range(2))
    order = _order(size, INT4_GROUP, INT4_UNIT, amx=amx)
    _fit_rows(
        weight.reshape(-1, size),
        order,
        values.reshape(layers * rows, -1),
        scales.reshape(layers * rows, -1),
        minima.reshape(layers * rows, -1),
    )
    if amx:
        return Int4Weight(values, _by_neurons(scales, rows), _by_neurons(minima, rows))
    return PlainIntegerWeight(values, scales, minima)


def quantise_down(weight: Array) -> Int8Down:
    """Quantise [layers, intermediate, hidden], float32 or bfloat16 bits."""
    layers, neurons, hidden = weight.shape
    values = aligned.empty((layers, neurons * hidden), np.int8)
    scales = aligned.empty((layers, neurons // INT8_GROUP * hidden), np.uint16)
    groups = layers * neurons // INT8_GROUP
    _round_columns(
        weight.reshape(groups, INT8_GROUP, hidden),
        values.reshape(groups, INT8_GROUP, hidden),
        scales.reshape(groups, hidden),
    )
    return Int8Down(values, scales)


def _order(size: int, group: int, unit: int, *, amx: bool) -> NDArray[np.int32]:
    """Which `unit` of values of a row lies where."""
    return np.arange(size // unit, dtype=np.int32) if amx else lane_order(size, group, unit)


@njit(**INNER)
def _in_bfloat16(value):  # type: ignore[no-untyped-def]
    """The nearest number that bfloat16 holds."""
    return from_bfloat16(to_bfloat16(value))


@njit(**INNER)
def _magnitude(value):  # type: ignore[no-untyped-def]
    """Bits of a value without its sign, which are ordered as magnitudes are, and NaN above them all."""
    return float_to_bits(value) & np.uint32(0x7FFFFFFF)


@njit(**INNER)
def _symmetric(largest):  # type: ignore[no-untyped-def]
    """Scale, bfloat16 bits, of a group of at most this `_magnitude`. A group with a NaN is to stay one that has it."""
    return to_bfloat16(bits_to_float(largest) / _WHOLE) if largest <= _INFINITY else _NAN


@njit(**INNER)
def _round(value, scale):  # type: ignore[no-untyped-def]
    """value / scale as a whole number of 8 bits; 0 if the scale is."""
    whole = min(max(np.rint(value / scale), -_WHOLE), _WHOLE) if scale > 0 else np.float32(0)
    return np.int8(whole)


@njit(**OPTIONS)
def _round_rows(weight, order, values, scales):  # type: ignore[no-untyped-def]
    """Rows of 8 bits, in groups along the row.

    Args:
        weight: float32 or bfloat16 bits [rows, size].
        order: See `lane_order`.
        values: Out, int8 [rows, size].
        scales: Out, bfloat16 bits [rows, size / 64].
    """
    threads = usable_threads()
    launch(threads, _round_some_rows, (threads, weight, order, values, scales))


@njit(**INNER)
def _round_some_rows(thread, threads, weight, order, values, scales):  # type: ignore[no-untyped-def]
    rows = weight.shape[0]
    for row in range(rows * thread // threads, rows * (thread + 1) // threads):
        whole = np.empty(weight.shape[1], np.int8)
        for group in range(scales.shape[1]):
            first = group * INT8_GROUP
            largest = np.uint32(0)
            for k in range(first, first + INT8_GROUP):
                largest = max(largest, _magnitude(widen(weight[row, k])))
            scales[row, group] = _symmetric(largest)
            scale = from_bfloat16(scales[row, group])
            for k in range(first, first + INT8_GROUP):
                whole[k] = _round(widen(weight[row, k]), scale)
        units, ordered = whole.view(np.uint16), values[row].view(np.uint16)
        for i in range(order.size):
            ordered[i] = units[order[i]]


@njit(**OPTIONS)
def _round_columns(weight, values, scales):  # type: ignore[no-untyped-def]
    """The same of groups [groups, 64, hidden] across 64 rows; scales are [groups, hidden]."""
    threads = usable_threads()
    launch(threads, _round_some_columns, (threads, weight, values, scales))


@njit(**INNER)
def _round_some_columns(thread, threads, weight, values, scales):  # type: ignore[no-untyped-def]
    groups = weight.shape[0]
    for group in range(groups * thread // threads, groups * (thread + 1) // threads):
        columns = weight.shape[2]
        largest, scale = np.zeros(columns, np.uint32), np.empty(columns, np.float32)
        for row in range(INT8_GROUP):
            for k in range(columns):
                largest[k] = max(largest[k], _magnitude(widen(weight[group, row, k])))
        for k in range(columns):
            scales[group, k] = _symmetric(largest[k])
            scale[k] = from_bfloat16(scales[group, k])
        for row in range(INT8_GROUP):
            for k in range(columns):
                values[group, row, k] = _round(widen(weight[group, row, k]), scale[k])


@njit(**INNER)
def _nearest(value, scale, minimum):  # type: ignore[no-untyped-def]
    """The whole number in 0 to 15 whose value * scale + minimum is nearest."""
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    return min(max(np.rint((value - minimum) * inverse), np.float32(0)), _STEPS)


@njit(**INNER)
def _fit(values, scales, minima):  # type: ignore[no-untyped-def]
    """Scales and minima of some groups: of a few starting points those that end in the least squares.

    From a range, a little narrower than the group's, values follow by rounding, and from these scale and minimum by
    linear regression, and values anew.

    Args:
        values: float32 [32, _TOGETHER], a column for each group: what is done to all of them is done by vectors.
        scales, minima: Out, float32 [_TOGETHER], which bfloat16 holds exactly.
    """
    size, groups = np.float32(INT4_GROUP), range(_TOGETHER)
    found = np.empty((INT4_GROUP, _TOGETHER), np.float32)
    low, high, mean, scale, minimum, total, error, variance, covariance = np.zeros((9, _TOGETHER), np.float32)
    least = np.full(_TOGETHER, np.inf, np.float32)
    low[:], high[:] = values[0], values[0]
    for k in range(INT4_GROUP):
        for g in groups:
            low[g], high[g] = min(low[g], values[k, g]), max(high[g], values[k, g])
            mean[g] += values[k, g] / size
    for share in _SHARES:
        for g in groups:
            minimum[g] = low[g] * share
            scale[g] = (high[g] * share - minimum[g]) / _STEPS
        for _ in range(_REFINEMENTS):
            for g in groups:
                scale[g], minimum[g] = _in_bfloat16(scale[g]), _in_bfloat16(minimum[g])
                total[g] = error[g] = variance[g] = covariance[g] = 0
            for k in range(INT4_GROUP):
                for g in groups:
                    value = _nearest(values[k, g], scale[g], minimum[g])
                    found[k, g] = value
                    total[g] += value
                    error[g] += (value * scale[g] + minimum[g] - values[k, g]) ** 2
            for g in groups:
                if error[g] < least[g]:
                    least[g], scales[g], minima[g] = error[g], scale[g], minimum[g]
                total[g] /= size
            for k in range(INT4_GROUP):
                for g in groups:
                    spread = found[k, g] - total[g]
                    variance[g] += spread * spread
                    covariance[g] += spread * values[k, g]
            for g in groups:
                if variance[g] > 0:
                    scale[g] = covariance[g] / variance[g]
                minimum[g] = mean[g] - scale[g] * total[g]


@njit(**OPTIONS)
def _fit_rows(weight, order, values, scales, minima):  # type: ignore[no-untyped-def]
    """Rows of 4 bits.

    Args:
        weight: float32 or bfloat16 bits [rows, size].
        order: See `lane_order`.
        values: Out, uint8 [rows, size / 2].
        scales, minima: Out, bfloat16 bits [rows, size / 32].
    """
    threads = usable_threads()
    launch(threads, _fit_some_rows, (threads, weight, order, values, scales, minima))


@njit(**INNER)
def _fit_some_rows(thread, threads, weight, order, values, scales, minima):  # type: ignore[no-untyped-def]
    rows, groups = scales.shape
    parts = (rows + _TOGETHER - 1) // _TOGETHER
    for some in range(parts * thread // threads, parts * (thread + 1) // threads):
        first = some * _TOGETHER
        numbers = np.empty((INT4_GROUP, _TOGETHER), np.float32)
        scale, minimum = np.empty((2, _TOGETHER), np.float32)
        largest = np.empty(_TOGETHER, np.uint32)
        whole = np.empty((_TOGETHER, weight.shape[1]), np.uint8)
        for group in range(groups):
            at = group * INT4_GROUP
            for n in range(_TOGETHER):
                row = min(first + n, rows - 1)
                largest[n] = 0
                for k in range(INT4_GROUP):
                    numbers[k, n] = widen(weight[row, at + k])
                    largest[n] = max(largest[n], _magnitude(numbers[k, n]))
            _fit(numbers, scale, minimum)
            for n in range(_TOGETHER):
                row = min(first + n, rows - 1)
                scales[row, group] = to_bfloat16(scale[n]) if largest[n] < _TOO_LARGE else _NAN
                minima[row, group] = to_bfloat16(minimum[n]) if minimum[n] != 0 else np.uint16(0)  # 0 without a sign
                for k in range(INT4_GROUP):
                    whole[n, at + k] = np.uint8(_nearest(numbers[k, n], scale[n], minimum[n]))
        ordered = np.empty(weight.shape[1], np.uint8)
        for n in range(min(_TOGETHER, rows - first)):
            units, ordered_units = whole[n].view(np.uint32), ordered.view(np.uint32)
            for i in range(order.size):
                ordered_units[i] = units[order[i]]
            for i in range(values.shape[1]):
                low = i // INT4_GROUP * 2 * INT4_GROUP + i % INT4_GROUP
                values[first + n, i] = ordered[low] | (ordered[low + INT4_GROUP] << np.uint8(4))


def _by_neurons(factors: Array, neurons: int) -> Array:
    """[layers, out * groups] to 16 neurons of one group after another."""
    by_group = factors.reshape(len(factors), neurons // NEURONS, NEURONS, -1).swapaxes(2, 3)
    ordered = aligned.empty(factors.shape, factors.dtype)
    ordered[:] = by_group.reshape(factors.shape)
    return ordered
