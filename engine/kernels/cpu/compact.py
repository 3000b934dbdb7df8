"""Products with 32 neurons that lie apart: vectors read them in place, tiles from a copy of their rows.

What a product gives for a neuron does not depend on its neighbours, so the result is the same to the last bit.
"""

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray

from engine.kernels.cpu.integer_plain import multiply_neurons
from engine.kernels.cpu.integer_rows import PlainIntegerRows
from engine.kernels.cpu.options import INNER
from engine.kernels.cpu.product import BLOCK, PlainRows, is_kind, multiply_listed, product
from engine.kernels.cpu.quantised import INT4_GROUP, INT8_GROUP, NEURONS, Int4Weight, Int8Weight
from engine.kernels.cpu.rows import CACHED, copy64, dots_cached, fetch

Array = NDArray[Any]


@njit(**INNER)
def _copy_factors(factors, neuron, out, place, groups):  # type: ignore[no-untyped-def]
    """Scales or minima of one neuron."""
    source = neuron // NEURONS * groups * NEURONS + neuron % NEURONS
    target = place // NEURONS * groups * NEURONS + place % NEURONS
    for g in range(groups):
        out[target + g * NEURONS] = factors[source + g * NEURONS]


def compacted(weights, size, memory):  # type: ignore[no-untyped-def]
    """A weight of 32 neurons of `size` values, as `weights`, in `memory`, uint8 (for use in kernels only).

    Where neurons are read in place, that is without AMX, it is only some memory.
    """
    raise NotImplementedError


@overload(compacted)
def _compacted(weights, size, memory):  # type: ignore[no-untyped-def]
    if is_kind(weights, Int8Weight):

        def int8(weights, size, memory):  # type: ignore[no-untyped-def]
            values, scales = BLOCK * size, 2 * BLOCK * (size // INT8_GROUP)
            return Int8Weight(memory[:values].view(np.int8), memory[values : values + scales].view(np.uint16))

        return int8
    if is_kind(weights, Int4Weight):

        def int4(weights, size, memory):  # type: ignore[no-untyped-def]
            values, factors = BLOCK * size // 2, 2 * BLOCK * (size // INT4_GROUP)
            return Int4Weight(
                memory[:values],
                memory[values : values + factors].view(np.uint16),
                memory[values + factors : values + 2 * factors].view(np.uint16),
            )

        return int4
    if getattr(weights, "dtype", None) == types.uint16:
        return lambda weights, size, memory: memory[: 2 * BLOCK * size].view(np.uint16)
    return lambda weights, size, memory: memory


def copy_neurons(weights, size, places, first, count, out):  # type: ignore[no-untyped-def]
    """Rows places[first : first + count] of `weights` to the front of `out`, for count <= 32 (in kernels only)."""
    raise NotImplementedError


@overload(copy_neurons)
def _copy_neurons(weights, size, places, first, count, out):  # type: ignore[no-untyped-def]
    if is_kind(weights, Int8Weight):

        def int8(weights, size, places, first, count, out):  # type: ignore[no-untyped-def]
            groups = size // INT8_GROUP
            for i in range(count):
                neuron = places[first + i]
                copy64(weights.values, neuron * size, out.values, i * size, size)
                _copy_factors(weights.scales, neuron, out.scales, i, groups)

        return int8
    if is_kind(weights, Int4Weight):

        def int4(weights, size, places, first, count, out):  # type: ignore[no-untyped-def]
            groups, half = size // INT4_GROUP, size // 2
            for i in range(count):
                neuron = places[first + i]
                copy64(weights.values, neuron * half, out.values, i * half, half)
                _copy_factors(weights.scales, neuron, out.scales, i, groups)
                _copy_factors(weights.minima, neuron, out.minima, i, groups)

        return int4

    def plain(weights, size, places, first, count, out):  # type: ignore[no-untyped-def]
        for i in range(count):
            copy64(weights, places[first + i] * size, out, i * size, size)

    return plain


def product_listed(inputs, rows, first, last, size, weights, places, listed, count, copy, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    """`product` of the up to 32 neurons places[listed : listed + count] (for use in kernels only).

    Args:
        places: Longer by 64 than what is listed, and written to there.
        copy: Memory from `compacted`.

    The other arguments are those of `product`.
    """
    raise NotImplementedError


@overload(product_listed)
def _product_listed(inputs, rows, first, last, size, weights, places, listed, count, copy, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    if is_kind(inputs, PlainRows):
        return _product_in_place
    return _integers_in_place if is_kind(inputs, PlainIntegerRows) else _product_of_copy


def _product_in_place(inputs, rows, first, last, size, weights, places, listed, count, copy, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    for i in range(count, BLOCK):  # what comes out for these is not read
        places[listed + i] = places[listed]
    if last - first == 1:
        for n in range(listed, listed + count, CACHED):
            dots_cached(out, at + n - listed, stride, inputs.values, first * size, size, weights, 0, places, n, size)
    else:
        multiply_listed(inputs.values, first, last, size, weights, 0, places, listed, out, at, stride)


def _integers_in_place(inputs, rows, first, last, size, weights, places, listed, count, copy, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    multiply_neurons(inputs, first, last, size, weights, 0, places, listed, count, 0, out, at, stride)


def _product_of_copy(inputs, rows, first, last, size, weights, places, listed, count, copy, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    copy_neurons(weights, size, places, listed, count, copy)
    product(inputs, rows, first, last, size, copy, 0, out, at, stride, scratch)


def fetch_neurons(weights, size, places, first, last):  # type: ignore[no-untyped-def]
    """Fetch rows places[first : last] of `weights`, which `copy_neurons` will read soon (for use in kernels only)."""
    raise NotImplementedError


@overload(fetch_neurons)
def _fetch_neurons(weights, size, places, first, last):  # type: ignore[no-untyped-def]
    quantised = isinstance(weights, types.BaseNamedTuple)
    share = 2 if quantised and weights[0].dtype == types.uint8 else 1  # values in an element

    def values_only(weights, size, places, first, last):  # type: ignore[no-untyped-def]
        for i in range(first, last):
            fetch(weights, places[i] * size, size)

    def of_quantised(weights, size, places, first, last):  # type: ignore[no-untyped-def]
        for i in range(first, last):
            fetch(weights.values, places[i] * size // share, size // share)

    return of_quantised if quantised else values_only
