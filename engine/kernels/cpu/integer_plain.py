"""Where AMX is missing: `product` with quantised weights by `integer_dots`, `multiply_down` by `integer_words`.

The integers are those of AMX. Neurons are read in the order of memory, each by a few token rows at a time and the rest
one by one, which changes no sum.
"""

import numpy as np
from numba import njit
from numba.extending import overload

from engine.kernels.cpu.down import add_in_order, multiply_down
from engine.kernels.cpu.integer_dots import dots_1, dots_2, dots_3, dots_4
from engine.kernels.cpu.integer_rows import PlainIntegerHidden, PlainIntegerRows
from engine.kernels.cpu.integer_simd import add_integers
from engine.kernels.cpu.integer_words import COLUMNS, LISTED, TOKENS, add_group, add_neurons
from engine.kernels.cpu.options import OPTIONS
from engine.kernels.cpu.product import BLOCK, is_kind, product
from engine.kernels.cpu.quantised import INT8_GROUP, NEURONS
from engine.kernels.cpu.rows import fetch

FETCHED = 9216  # bytes of weights from the neuron at hand to the one that is fetched
DOWN_AHEAD = 16  # likewise neurons of `down`
_CONSECUTIVE = np.arange(BLOCK)


@overload(product)
def _product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    return integer_product if is_kind(inputs, PlainIntegerRows) else None


def integer_product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    """See `product` (for use in kernels only)."""
    line = size // 2 if weights.minima.size else size  # bytes
    ahead = FETCHED // line
    multiply_neurons(inputs, first, last, size, weights, neuron, _CONSECUTIVE, 0, BLOCK, ahead, out, at, stride)


@njit(**OPTIONS)
def multiply_neurons(inputs, first, last, size, weights, base, places, listed, count, ahead, out, at, stride):  # type: ignore[no-untyped-def]
    """`product` of the neurons base + places[listed : listed + count]; fetches what is `ahead` neurons of each."""
    rows, scales, sums = inputs.values, inputs.scales, inputs.sums
    values, factors, minima = weights.values, weights.scales, weights.minima
    row = first
    while row < last:
        left, target = last - row, at + (row - first) * stride
        if left >= 4:
            for n in range(count):
                j = base + places[listed + n]
                dots_4(out, target + n, stride, rows, row, size, scales, sums, values, j, j + ahead, factors, minima)
            row += 4
        elif left == 3:
            for n in range(count):
                j = base + places[listed + n]
                dots_3(out, target + n, stride, rows, row, size, scales, sums, values, j, j + ahead, factors, minima)
            row += 3
        elif left == 2:
            for n in range(count):
                j = base + places[listed + n]
                dots_2(out, target + n, stride, rows, row, size, scales, sums, values, j, j + ahead, factors, minima)
            row += 2
        else:
            for n in range(count):
                j = base + places[listed + n]
                dots_1(out, target + n, stride, rows, row, size, scales, sums, values, j, j + ahead, factors, minima)
            row += 1


@overload(multiply_down)
def _multiply_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, panel, out):  # type: ignore[no-untyped-def]
    return _int8_down if is_kind(h, PlainIntegerHidden) else None


def _int8_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, panel, out):  # type: ignore[no-untyped-def]
    values, scales, words, row_scales = down.values, down.scales, h.values, h.scales
    alone, columns = rows // TOKENS * TOKENS, last - first
    counts = panel[:columns].view(np.int32)
    for r in range(rows):
        totals[r * hidden + first : r * hidden + last] = 0
    for g in range(begin // INT8_GROUP, end // INT8_GROUP):
        if alone > 0:
            for k in range(first, last, INT8_GROUP):
                # The next group's neurons, in the order of memory; each block of columns fetches its share.
                right = min(k + INT8_GROUP, last)
                for line in range(INT8_GROUP * (k - first) // columns, INT8_GROUP * (right - first) // columns):
                    fetch(values, ((g + 1) * INT8_GROUP + line) * hidden + first, columns)
                for r in range(0, alone, TOKENS):
                    for column in range(k, right, COLUMNS):
                        add_group(totals, words, r, intermediate, row_scales, values, scales, g, hidden, column)
        for r in range(alone, rows):
            counts[:] = 0
            for j in range(g * INT8_GROUP, (g + 1) * INT8_GROUP, LISTED):
                if r == 0:
                    for n in range(j + DOWN_AHEAD, j + DOWN_AHEAD + LISTED):
                        fetch(values, n * hidden + first, columns)
                at, base = r * intermediate + j, j * hidden + first
                add_neurons(counts, words, at, values, base, _CONSECUTIVE, 0, hidden, columns)
            factor = row_scales[r * (intermediate // INT8_GROUP) + g]
            for c in range(0, columns, NEURONS):
                place = first + c
                add_integers(totals, r * hidden + place, counts, c, scales, g * hidden + place, factor)
    add_in_order(totals, rows, hidden, first, last, down, out)
