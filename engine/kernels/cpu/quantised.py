"""Weights of 8 and 4 bits, laid out for AMX or for vector loops.

A group is 64 (int8) or 32 (int4) consecutive values along the axis that a product sums over. Each has a scale, and
int4 a minimum, in bfloat16. Token rows become integers of 15 bits on the way, in groups of the same size. So what a
product adds up in a group are integers: exact, in whatever order; scales come in once per group.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

INT8_GROUP, INT4_GROUP = 64, 32
NEURONS = 16  # whose scales of one group lie together for AMX
LANES = 8  # of the vectors that read weights without AMX, wherever they might be longer: rows are often short
INT8_UNIT, INT4_UNIT = 2, 4  # consecutive values in a lane, whose products an instruction adds up

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
