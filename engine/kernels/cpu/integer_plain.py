"""Products with quantised weights where AMX is missing: `product` and `multiply_down` by the loops of `integer_words`.

The integers and the order of the float32 sums are those of AMX. Token rows go through what is made of a block of
weights a few at a time, and the rest one by one; that changes no sum.
"""

from numba.extending import overload

from engine.kernels.cpu.down import add_in_order, multiply_down
from engine.kernels.cpu.integer_rows import PlainIntegerHidden, PlainIntegerRows
from engine.kernels.cpu.integer_words import (
    COLUMNS_ALONE,
    COLUMNS_TOGETHER,
    TOKENS,
    add_group_alone,
    add_group_together,
    dots_int4_alone,
    dots_int4_together,
    dots_int8_alone,
    dots_int8_together,
)
from engine.kernels.cpu.product import BLOCK, is_kind, product
from engine.kernels.cpu.quantised import INT8_GROUP, NEURONS, Int4Weight
from engine.kernels.cpu.rows import fetch


@overload(product)
def _product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    if not is_kind(inputs, PlainIntegerRows):
        return None
    return int4_product if is_kind(weights, Int4Weight) else int8_product


def int8_product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    """See `product` (for use in kernels only)."""
    words, row_scales, values, scales = inputs.values, inputs.scales, weights.values, weights.scales
    alone = first + (last - first) // TOKENS * TOKENS
    for n in range(neuron, neuron + BLOCK, NEURONS):
        place = at + n - neuron
        for r in range(first, alone, TOKENS):
            target = place + (r - first) * stride
            dots_int8_together(out, target, stride, words, r, size, row_scales, row_scales, values, n, scales, scales)
        for r in range(alone, last):
            target = place + (r - first) * stride
            dots_int8_alone(out, target, stride, words, r, size, row_scales, row_scales, values, n, scales, scales)


def int4_product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    """See `product` (for use in kernels only)."""
    words, factors, sums = inputs.values, inputs.scales, inputs.sums
    values, scales, minima = weights.values, weights.scales, weights.minima
    alone = first + (last - first) // TOKENS * TOKENS
    for n in range(neuron, neuron + BLOCK, NEURONS):
        place = at + n - neuron
        for r in range(first, alone, TOKENS):
            target = place + (r - first) * stride
            dots_int4_together(out, target, stride, words, r, size, factors, sums, values, n, scales, minima)
        for r in range(alone, last):
            target = place + (r - first) * stride
            dots_int4_alone(out, target, stride, words, r, size, factors, sums, values, n, scales, minima)


@overload(multiply_down)
def _multiply_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, panel, out):  # type: ignore[no-untyped-def]
    return _int8_down if is_kind(h, PlainIntegerHidden) else None


def _int8_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, panel, out):  # type: ignore[no-untyped-def]
    values, scales, words, row_scales = down.values, down.scales, h.values, h.scales
    alone, columns = rows // TOKENS * TOKENS, last - first
    for r in range(rows):
        totals[r * hidden + first : r * hidden + last] = 0
    for g in range(begin // INT8_GROUP, end // INT8_GROUP):
        for k in range(first, last, INT8_GROUP):
            # The next group's neurons, in the order of memory; each block of columns fetches its share.
            for line in range(INT8_GROUP * (k - first) // columns, INT8_GROUP * (k - first + INT8_GROUP) // columns):
                fetch(values, ((g + 1) * INT8_GROUP + line) * hidden + first, columns)
            for r in range(0, alone, TOKENS):
                for column in range(k, k + INT8_GROUP, COLUMNS_TOGETHER):
                    add_group_together(totals, words, r, intermediate, row_scales, values, scales, g, hidden, column)
            for r in range(alone, rows):
                for column in range(k, k + INT8_GROUP, COLUMNS_ALONE):
                    add_group_alone(totals, words, r, intermediate, row_scales, values, scales, g, hidden, column)
    add_in_order(totals, rows, hidden, first, last, down, out)
