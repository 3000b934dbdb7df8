"""Integer products by vectors: exact sums of each group, taken in with their scales in order."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from engine.kernels.cpu.integer_plain import int4_product, int8_product
from engine.kernels.cpu.integer_rows import LARGEST, PlainIntegerRows
from engine.kernels.cpu.integer_words import (
    COLUMNS_ALONE,
    COLUMNS_TOGETHER,
    TOKENS,
    WIDTH,
    add_group_alone,
    add_group_together,
    multiply_words,
    multiply_words_plainly,
)
from engine.kernels.cpu.product import BLOCK
from engine.kernels.cpu.quantised import INT4_GROUP, INT8_GROUP, NEURONS, Int4Weight, Int8Weight
from engine.kernels.cpu.simd import element_pointer, load_as, store_as

Array = NDArray[Any]
MOST = int(LARGEST)
SIZE, ROWS = 192, 7
rng = np.random.default_rng


def integers(*shape: int, seed: int, most: int, dtype: Any) -> Array:
    """Random integers, the largest ones among them."""
    values = rng(seed).integers(-most, most + 1, shape)
    values.reshape(-1)[::5] = most
    values.reshape(-1)[1::7] = -most
    return values.astype(dtype)


def powers(*shape: int, seed: int) -> Array:
    """float32 that bfloat16 holds exactly and that products with integers keep exact."""
    return (2.0 ** rng(seed).integers(-20, -9, shape)).astype(np.float32)


def bits(values: Array) -> Array:
    """bfloat16 bits."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def by_neurons(factors: Array) -> Array:
    """[out, groups] as kernels want it: 16 neurons of one group after another."""
    out, groups = factors.shape
    return factors.reshape(out // NEURONS, NEURONS, groups).transpose(0, 2, 1).reshape(-1)


def compiled(multiply: Callable[..., Any]) -> Callable[..., None]:
    ints, words = (ir.VectorType(ir.IntType(width), count) for width, count in ((32, WIDTH), (16, 2 * WIDTH)))

    @intrinsic
    def call(typingctx: Any, total: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            first = ir.Constant(ir.IntType(64), 0)
            pointers = [
                element_pointer(context, builder, kind, arg, first)
                for kind, arg in zip(signature.args, args, strict=True)
            ]
            values = [load_as(builder, p, kind) for p, kind in zip(pointers, (ints, words, words), strict=True)]
            store_as(builder, multiply(builder, *values), pointers[0])
            return context.get_dummy_value()

        return types.void(total, a, b), codegen

    @njit
    def run(total, a, b):  # type: ignore[no-untyped-def]
        call(total, a, b)

    return run


@pytest.mark.parametrize("multiply", [multiply_words, multiply_words_plainly])
def test_words_are_multiplied_two_by_two_and_added(multiply: Callable[..., Any]) -> None:
    a, b = (integers(2 * WIDTH, seed=seed, most=MOST, dtype=np.int16) for seed in (1, 2))
    total = integers(WIDTH, seed=3, most=1000, dtype=np.int32)
    expected = total + (a.astype(np.int64) * b).reshape(WIDTH, 2).sum(1)

    compiled(multiply)(total, a, b)

    np.testing.assert_array_equal(total, expected)


def in_order(sums: Array, factors: Array, offsets: Array | None = None) -> Array:
    """float32 sums over the last axis, one group after another: whole numbers times factors, plus offsets."""
    total = np.zeros(sums.shape[:-1], np.float32)
    for g in range(sums.shape[-1]):
        total = (total.astype(np.float64) + sums[..., g].astype(np.float32) * factors[..., g]).astype(np.float32)
        if offsets is not None:
            total = (total.astype(np.float64) + offsets[..., g]).astype(np.float32)
    return total


def grouped_sums(words: Array, values: Array, group: int) -> Array:
    """Exact sums [rows, neurons, groups]."""
    parts = words.astype(np.int64)[:, None] * values.astype(np.int64)[None]
    return parts.reshape(*parts.shape[:2], -1, group).sum(-1)


call_int8_product, call_int4_product = njit(int8_product), njit(int4_product)
every_part = pytest.mark.parametrize(("first", "last"), [(0, 1), (0, ROWS), (2, 2 + TOKENS), (3, ROWS)])


@every_part
def test_int8_products_are_exact_in_each_group(first: int, last: int) -> None:
    groups, out = SIZE // INT8_GROUP, 2 * BLOCK
    words = integers(ROWS, SIZE, seed=1, most=MOST, dtype=np.int16)
    values = integers(out, SIZE, seed=2, most=127, dtype=np.int8)
    row_scales, scales = powers(ROWS, groups, seed=3), powers(out, groups, seed=4)
    inputs = PlainIntegerRows(words.reshape(-1), row_scales.reshape(-1), np.full(ROWS * groups, np.nan, np.float32))
    weights = Int8Weight(values.reshape(-1), bits(by_neurons(scales)))
    found = np.full((ROWS, out), np.nan, np.float32)

    for neuron in range(0, out, BLOCK):
        at = first * out + neuron
        call_int8_product(inputs, ROWS, first, last, SIZE, weights, neuron, found.reshape(-1), at, out, found[0])

    expected = in_order(grouped_sums(words, values, INT8_GROUP), row_scales[:, None] * scales[None])
    np.testing.assert_array_equal(found[first:last], expected[first:last])
    assert np.isnan(found[:first]).all()
    assert np.isnan(found[last:]).all()


@every_part
def test_int4_products_are_exact_in_each_group(first: int, last: int) -> None:
    groups, out = SIZE // INT4_GROUP, 2 * BLOCK
    words = integers(ROWS, SIZE, seed=1, most=MOST, dtype=np.int16)
    values = rng(2).integers(0, 16, (out, SIZE)).astype(np.uint8)
    packed = values.reshape(out, -1, 2, INT4_GROUP)
    row_scales, scales, minima = (powers(n, groups, seed=s) for n, s in ((ROWS, 3), (out, 4), (out, 5)))
    row_sums = powers(ROWS, groups, seed=6)
    inputs = PlainIntegerRows(words.reshape(-1), row_scales.reshape(-1), row_sums.reshape(-1))
    nibbles = (packed[:, :, 0] | (packed[:, :, 1] << 4)).reshape(-1)
    weights = Int4Weight(nibbles, bits(by_neurons(scales)), bits(by_neurons(-minima)))
    found = np.full((ROWS, out), np.nan, np.float32)

    for neuron in range(0, out, BLOCK):
        at = first * out + neuron
        call_int4_product(inputs, ROWS, first, last, SIZE, weights, neuron, found.reshape(-1), at, out, found[0])

    sums = grouped_sums(words, values, INT4_GROUP)
    expected = in_order(sums, row_scales[:, None] * scales[None], -minima[None] * row_sums[:, None])
    np.testing.assert_array_equal(found[first:last], expected[first:last])
    assert np.isnan(found[:first]).all()
    assert np.isnan(found[last:]).all()


@njit
def call_alone(totals, words, row, intermediate, row_scales, values, scales, group, hidden, column):  # type: ignore[no-untyped-def]
    add_group_alone(totals, words, row, intermediate, row_scales, values, scales, group, hidden, column)


@njit
def call_together(totals, words, row, intermediate, row_scales, values, scales, group, hidden, column):  # type: ignore[no-untyped-def]
    add_group_together(totals, words, row, intermediate, row_scales, values, scales, group, hidden, column)


@pytest.mark.parametrize(
    ("call", "rows", "width"), [(call_alone, 1, COLUMNS_ALONE), (call_together, TOKENS, COLUMNS_TOGETHER)]
)
def test_a_group_of_neurons_is_added_to_some_columns_of_some_rows(
    call: Callable[..., None], rows: int, width: int
) -> None:
    hidden, groups, group, row, column = 160, SIZE // INT8_GROUP, 1, 2, 64
    words = integers(ROWS, SIZE, seed=1, most=MOST, dtype=np.int16)
    values = integers(SIZE, hidden, seed=2, most=127, dtype=np.int8)
    row_scales, scales = powers(ROWS, groups, seed=3), powers(groups, hidden, seed=4)
    before = powers(ROWS, hidden, seed=5)
    totals = before.copy()

    arrays = [array.reshape(-1) for array in (totals, words, row_scales, values, bits(scales))]
    call(arrays[0], arrays[1], row, SIZE, arrays[2], arrays[3], arrays[4], group, hidden, column)

    own, places = slice(row, row + rows), slice(column, column + width)
    neurons = slice(group * INT8_GROUP, (group + 1) * INT8_GROUP)
    sums = (words[own, neurons].astype(np.int64) @ values[neurons, places].astype(np.int64)).astype(np.float32)
    factors = (row_scales[own, group, None] * scales[None, group, places]).astype(np.float64)
    expected = before.copy()
    expected[own, places] = (before[own, places] + sums * factors).astype(np.float32)
    np.testing.assert_array_equal(totals, expected)
