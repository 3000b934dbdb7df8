"""Weights of 8 and 4 bits, laid out for AMX or for vector loops.

A group is 64 (int8) or 32 (int4) consecutive values along the axis that a product sums over. Each has a scale, and
int4 a minimum, in bfloat16. Token rows become integers of 15 bits on the way, in groups of the same size. So what a
product adds up in a group are integers: exact, in whatever order; scales come in once per group.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.cpu import aligned
from engine.kernels.cpu.math import from_bfloat16, to_bfloat16
from engine.kernels.cpu.options import OPTIONS

INT8_GROUP, INT4_GROUP = 64, 32
NEURONS = 16  # whose scales of one group lie together for AMX
LANES = 8  # of the vectors that read weights without AMX, wherever they might be longer: rows are often short
INT8_UNIT, INT4_UNIT = 2, 4  # consecutive values in a lane, whose products an instruction adds up
_SHARES = np.array([1.0, 0.95, 0.9, 0.85], np.float32)  # of a group's range, to begin with
_REFINEMENTS, _STEPS = 3, np.float32(15)

Array = NDArray[Any]


class Int8Weight(NamedTuple):
    """Rows of neurons for AMX, summed over along the row; `values[...] * scale` is the weight."""

    values: Array  # int8 [layers, out * in]
    scales: Array  # bfloat16 bits [layers, (out / 16) * groups * 16]


class Int4Weight(NamedTuple):
    """Likewise, `values[...] * scale + minimum`; a byte has elements i (low half) and i + 32 of 64."""

    values: Array  # uint8 [layers, out * in / 2]
    scales: Array
    minima: Array


class PlainIntegerWeight(NamedTuple):
    """Either without AMX: the values of a neuron in `lane_order`, int8, or uint8 of two 4-bit values as above."""

    values: Array
    scales: Array  # bfloat16 bits [layers, out * groups]
    minima: Array  # likewise, or [layers, 0] for int8


class Int8Down(NamedTuple):
    """Rows of neurons that are summed over: a group is 64 neurons."""

    values: Array  # int8 [layers, intermediate * hidden]
    scales: Array  # bfloat16 bits [layers, intermediate / 64 * hidden]


def lane_order(size: int, group: int, unit: int) -> NDArray[np.int32]:
    """Which `unit` of values of a row lies where: int32 [size / unit].

    Groups are taken eight at a time, so that each has a lane of its own, then four, two and one, which share the lanes
    out. A lane has a unit of its group in a vector, and more of them in the next ones.
    """
    places = np.arange(size // unit, dtype=np.int32).reshape(-1, group // unit)
    blocks, first = [], 0
    while first < len(places):
        count = min(LANES, 1 << ((len(places) - first).bit_length() - 1))
        lanes = places[first : first + count].reshape(count, -1, LANES // count)
        blocks.append(lanes.transpose(1, 0, 2).reshape(-1))
        first += count
    return np.concatenate(blocks)


def _in_lanes(whole: Array, group: int, unit: int) -> Array:
    """Rows [out, in] of bytes, each in `lane_order`."""
    units = whole.view(np.dtype(f"u{unit}"))
    return units.take(lane_order(whole.shape[1], group, unit), axis=1).view(whole.dtype)


def quantise_int8(weight: Tensor, *, amx: bool) -> Int8Weight | PlainIntegerWeight:
    """Quantise [layers, out, in], one matrix after another."""
    layers, rows, size = weight.shape
    values = aligned.empty((layers, rows * size), np.int8)
    scales = aligned.empty((layers, rows * size // INT8_GROUP), np.uint16)
    for layer in range(layers):
        groups = weight[layer].float().reshape(rows, -1, INT8_GROUP)
        whole, scale = _symmetric(groups, -1)
        found, bits = whole.reshape(rows, size).numpy(), _bits(scale)
        values[layer] = (found if amx else _in_lanes(found, INT8_GROUP, INT8_UNIT)).reshape(-1)
        scales[layer] = _by_neurons(bits) if amx else bits.reshape(-1)
    return Int8Weight(values, scales) if amx else PlainIntegerWeight(values, scales, scales[:, :0])


def quantise_int4(weight: Tensor, *, amx: bool) -> Int4Weight | PlainIntegerWeight:
    """Quantise [layers, out, in], one matrix after another."""
    layers, rows, size = weight.shape
    values = aligned.empty((layers, rows * size // 2), np.uint8)
    scales, minima = (aligned.empty((layers, rows * size // INT4_GROUP), np.uint16) for _ in range(2))
    for layer in range(layers):
        groups = weight[layer].float().reshape(-1, INT4_GROUP).numpy()
        whole, scale, minimum = np.empty(groups.shape, np.uint8), *np.empty((2, len(groups)), np.uint16)
        _fit(groups, whole, scale, minimum)
        found = whole.reshape(rows, size)
        found = found if amx else _in_lanes(found, INT4_GROUP, INT4_UNIT)
        pairs = found.reshape(rows, -1, 2, INT4_GROUP)
        values[layer] = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1)
        by_row = (bits.reshape(rows, -1) for bits in (scale, minimum))
        scales[layer], minima[layer] = (_by_neurons(bits) if amx else bits.reshape(-1) for bits in by_row)
    return Int4Weight(values, scales, minima) if amx else PlainIntegerWeight(values, scales, minima)


def quantise_down(weight: Tensor) -> Int8Down:
    """Quantise [layers, intermediate, hidden], one matrix after another."""
    layers, neurons, hidden = weight.shape
    values = aligned.empty((layers, neurons * hidden), np.int8)
    scales = aligned.empty((layers, neurons // INT8_GROUP * hidden), np.uint16)
    for layer in range(layers):
        groups = weight[layer].float().reshape(-1, INT8_GROUP, hidden)
        whole, scale = _symmetric(groups, 1)
        values[layer] = whole.reshape(-1).numpy()
        scales[layer] = _bits(scale).reshape(-1)
    return Int8Down(values, scales)


def _symmetric(groups: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """int8 values and float32 scales, which bfloat16 holds exactly, of groups along an axis."""
    scale = (groups.abs().amax(axis, keepdim=True) / 127).bfloat16().float()
    whole = torch.where(scale > 0, groups / scale, 0).round().clamp(-127, 127).to(torch.int8)
    return whole, scale.squeeze(axis)


@njit(parallel=True, **OPTIONS)
def _fit(groups, whole, scales, minima):  # type: ignore[no-untyped-def]
    """Values of 4 bits, scales and minima of groups: of a few starting points the one that ends in the least squares.

    From a range, a little narrower than the group's, values follow by rounding, and from these scale and minimum by
    linear regression, and values anew.

    Args:
        groups: float32 [n, 32].
        whole: Out, uint8 [n, 32], in 0 to 15.
        scales, minima: Out, uint16 [n], bfloat16 bits.
    """
    for group in prange(groups.shape[0]):
        values, size = groups[group], np.float32(groups.shape[1])
        found, mean = np.empty(groups.shape[1], np.float32), values.sum() / size
        low, high = values.min(), values.max()
        least = np.float32(np.inf)
        if low == high:  # nothing to fit; zeros stay zeros without a sign
            whole[group], scales[group], minima[group] = 0, 0, to_bfloat16(low) if low != 0 else np.uint16(0)
            continue
        for share in _SHARES:
            minimum = low * share
            scale = (high * share - minimum) / _STEPS
            for _ in range(_REFINEMENTS):
                scale_bits, minimum_bits = to_bfloat16(scale), to_bfloat16(minimum)
                scale, minimum = from_bfloat16(scale_bits), from_bfloat16(minimum_bits)
                inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
                error = total = np.float32(0)
                for k in range(values.size):
                    value = min(max(np.rint((values[k] - minimum) * inverse), np.float32(0)), _STEPS)
                    found[k] = value
                    total += value
                    error += (value * scale + minimum - values[k]) ** 2
                if error < least:
                    least, scales[group], minima[group] = error, scale_bits, minimum_bits
                    for k in range(values.size):
                        whole[group, k] = np.uint8(found[k])
                middle = total / size
                variance = covariance = np.float32(0)
                for k in range(values.size):
                    spread = found[k] - middle
                    variance += spread * spread
                    covariance += spread * values[k]
                if variance > 0:
                    scale = covariance / variance
                minimum = mean - scale * middle


def _by_neurons(factors: Array) -> Array:
    """[out, groups] to 16 neurons of one group after another."""
    out, groups = factors.shape
    ordered: Array = factors.reshape(out // NEURONS, NEURONS, groups).transpose(0, 2, 1).reshape(-1)
    return ordered


def _bits(factors: Tensor) -> Array:
    bits: Array = factors.bfloat16().contiguous().view(torch.uint16).numpy()
    return bits
