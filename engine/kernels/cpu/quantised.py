"""Weights of 8 and 4 bits.

A group is 64 (int8) or 32 (int4) consecutive values along the axis that a product sums over. Each has a scale, and
int4 a minimum, in bfloat16. Token rows become integers of 15 bits on the way, in groups of the same size. So what a
product adds up in a group are integers: exact, in whatever order; scales come in once per group.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

INT8_GROUP, INT4_GROUP = 64, 32
NEURONS = 16  # whose scales of one group lie together

Array = NDArray[Any]


class Int8Weight(NamedTuple):
    """Rows of neurons, summed over along the row; `values[...] * scale` is the weight."""

    values: Array  # int8 [layers, out * in]
    scales: Array  # bfloat16 bits [layers, (out / 16) * groups * 16]


class Int4Weight(NamedTuple):
    """Likewise, `values[...] * scale + minimum`; a byte has elements i (low half) and i + 32 of 64."""

    values: Array  # uint8 [layers, out * in / 2]
    scales: Array
    minima: Array


class Int8Down(NamedTuple):
    """Rows of neurons that are summed over: a group is 64 neurons."""

    values: Array  # int8 [layers, intermediate * hidden]
    scales: Array  # bfloat16 bits [layers, intermediate / 64 * hidden]


def quantise_int8(weight: Tensor) -> Int8Weight:
    """Quantise [layers, out, in], one matrix after another."""
    layers, rows, size = weight.shape
    values = np.empty((layers, rows * size), np.int8)
    scales = np.empty((layers, rows * size // INT8_GROUP), np.uint16)
    for layer in range(layers):
        groups = weight[layer].float().reshape(rows, -1, INT8_GROUP)
        whole, scale = _symmetric(groups, -1)
        values[layer] = whole.reshape(-1).numpy()
        scales[layer] = _by_neurons(scale)
    return Int8Weight(values, scales)


def quantise_int4(weight: Tensor) -> Int4Weight:
    """Quantise [layers, out, in], one matrix after another."""
    layers, rows, size = weight.shape
    values = np.empty((layers, rows * size // 2), np.uint8)
    scales, minima = (np.empty((layers, rows * size // INT4_GROUP), np.uint16) for _ in range(2))
    for layer in range(layers):
        groups = weight[layer].float().reshape(rows, -1, INT4_GROUP)
        whole, scale, minimum = _asymmetric(groups)
        pairs = whole.reshape(rows, -1, 2, INT4_GROUP)
        values[layer] = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1).numpy()
        scales[layer], minima[layer] = _by_neurons(scale), _by_neurons(minimum)
    return Int4Weight(values, scales, minima)


def quantise_down(weight: Tensor) -> Int8Down:
    """Quantise [layers, intermediate, hidden], one matrix after another."""
    layers, neurons, hidden = weight.shape
    values = np.empty((layers, neurons * hidden), np.int8)
    scales = np.empty((layers, neurons // INT8_GROUP * hidden), np.uint16)
    for layer in range(layers):
        groups = weight[layer].float().reshape(-1, INT8_GROUP, hidden)
        whole, scale = _symmetric(groups, 1)
        values[layer] = whole.reshape(-1).numpy()
        scales[layer] = _bits(scale)
    return Int8Down(values, scales)


def _symmetric(groups: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """int8 values and float32 scales, which bfloat16 holds exactly, of groups along an axis."""
    scale = (groups.abs().amax(axis, keepdim=True) / 127).bfloat16().float()
    whole = torch.where(scale > 0, groups / scale, 0).round().clamp(-127, 127).to(torch.int8)
    return whole, scale.squeeze(axis)


def _asymmetric(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values in 0 to 15 as uint8, scales and minima: of a few starting points the one that ends in the least squares.

    From a range, a little narrower than the group's, values follow by rounding, and from these scale and minimum by
    linear regression, and values anew.
    """
    best: list[Tensor] = []
    least = None
    for share in (1.0, 0.95, 0.9, 0.85):
        minimum = groups.amin(-1, keepdim=True) * share
        scale = (groups.amax(-1, keepdim=True) * share - minimum) / 15
        for _ in range(3):
            minimum, scale = (factor.bfloat16().float() for factor in (minimum, scale))
            whole = torch.where(scale > 0, (groups - minimum) / scale, 0).round().clamp(0, 15)
            error = (whole * scale + minimum - groups).square().sum(-1, keepdim=True)
            found = [whole, scale, minimum]
            if least is None:
                best, least = found, error
            else:
                better = error < least
                best = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
                least = torch.minimum(error, least)
            spread = whole - whole.mean(-1, keepdim=True)
            variance = spread.square().sum(-1, keepdim=True)
            scale = torch.where(variance > 0, (spread * groups).sum(-1, keepdim=True) / variance, scale)
            minimum = groups.mean(-1, keepdim=True) - scale * whole.mean(-1, keepdim=True)
    whole, scale, minimum = best
    return whole.to(torch.uint8), scale.squeeze(-1), minimum.squeeze(-1)


def _by_neurons(factors: Tensor) -> Array:
    """[out, groups] to 16 neurons of one group after another."""
    out, groups = factors.shape
    return _bits(factors.reshape(out // NEURONS, NEURONS, groups).transpose(1, 2))


def _bits(factors: Tensor) -> Array:
    bits: Array = factors.bfloat16().contiguous().view(torch.uint16).reshape(-1).numpy()
    return bits
