"""Products of token rows with 32 rows of a weight at a time, the piece that all matrix products of a step are made of.

A weight is [out, in], neuron-major. Token rows are laid out once for all of a layer's weights that read them:

- `TileRows` for AMX and bfloat16 weights: pairs [tiles][in / 2][columns], a column for each of up to 16 rows, words of
  two bfloat16. So 16 neurons as they lie in memory are one operand and 16 token rows the other.
- `PlainRows` for everything else: float32 [rows][in], in the order of `rows.place_of`.

Both add the terms of one output in an order that depends on `in` alone: a row has the same bits in any batch.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray

from engine.kernels.cpu.math import to_bfloat16
from engine.kernels.cpu.options import OPTIONS
from engine.kernels.cpu.rows import dots_4x4, dots_8x1, place_of, prefetch, transpose16
from engine.kernels.cpu.tiles import ROW_BYTES, ROWS, clear, load, multiply_bfloat16, store, tile_config

BLOCK = 32  # neurons that are multiplied together

_CONSECUTIVE = np.arange(BLOCK)


class TileRows(NamedTuple):
    """Rows for AMX: uint32 [tiles * in / 2 * columns]."""

    pairs: Any


class PlainRows(NamedTuple):
    """Rows for vector loops: float32 [rows * in]."""

    values: Any


def tile_columns(rows: int) -> int:
    """Columns of each tile of a batch."""
    return min(rows, ROWS)


def product_tiles(rows: int) -> NDArray[np.uint8]:
    """Shapes of tiles for `product`: 0 to 3 are sums [16 neurons, columns], 4 and 5 weights, 6 and 7 token rows."""
    width = 4 * tile_columns(rows)
    sums, weights, inputs = (ROWS, width), (ROWS, ROW_BYTES), (ROWS, width)
    return tile_config({**dict.fromkeys(range(4), sums), 4: weights, 5: weights, 6: inputs, 7: inputs})


def is_kind(value: Any, kind: type) -> bool:
    """Whether a Numba type is this NamedTuple."""
    return isinstance(value, types.NamedTuple | types.NamedUniTuple) and value.instance_class is kind


def pack_row(row, x, num_rows, inputs, weights):  # type: ignore[no-untyped-def]
    """Lay one row x, float32 [in], out as row `row` of `num_rows` in `inputs` (for use in kernels only)."""
    raise NotImplementedError


@overload(pack_row)
def _pack_row(row, x, num_rows, inputs, weights):  # type: ignore[no-untyped-def]
    if is_kind(inputs, TileRows):
        return _pack_tile_row
    return _pack_plain_row if is_kind(inputs, PlainRows) else None


def _pack_tile_row(row, x, num_rows, inputs, weights):  # type: ignore[no-untyped-def]
    columns, half = min(num_rows, ROWS), x.size // 2
    at = row // ROWS * half * columns + row % ROWS
    for k in range(half):
        low, high = to_bfloat16(x[2 * k]), to_bfloat16(x[2 * k + 1])
        inputs.pairs[at + k * columns] = np.uint32(low) | (np.uint32(high) << np.uint32(16))


def _pack_plain_row(row, x, num_rows, inputs, weights):  # type: ignore[no-untyped-def]
    for k in range(x.size):
        inputs.values[row * x.size + place_of(k, weights)] = x[k]


def product(inputs, first_row, num_rows, size, weights, neuron, out, scratch):  # type: ignore[no-untyped-def]
    """out[r * 32 + n] = dot(row r, weights[neuron + n]) for n < 32 and rows r >= first_row (for use in kernels only).

    Args:
        inputs: Packed rows.
        first_row: Rows before it may be left out.
        num_rows: Rows in all.
        size: `in`, a multiple of 32.
        weights: [out * in], float32 or bfloat16 bits.
        neuron: First of the 32.
        out: float32 [at least num_rows * 32].
        scratch: float32 [1024].
    """
    raise NotImplementedError


@overload(product)
def _product(inputs, first_row, num_rows, size, weights, neuron, out, scratch):  # type: ignore[no-untyped-def]
    if is_kind(inputs, TileRows):
        return _tile_product
    return _plain_product if is_kind(inputs, PlainRows) else None


def _plain_product(inputs, first_row, num_rows, size, weights, neuron, out, scratch):  # type: ignore[no-untyped-def]
    fours = first_row + (num_rows - first_row) // 4 * 4
    base = neuron * size
    for n in range(0, BLOCK, 4):
        for row in range(first_row, fours, 4):
            dots_4x4(out, row * BLOCK + n, BLOCK, inputs.values, row * size, size, weights, base, _CONSECUTIVE, n, size)
    for n in range(0, BLOCK, 8):
        for row in range(fours, num_rows):
            dots_8x1(out, row * BLOCK + n, BLOCK, inputs.values, row * size, size, weights, base, _CONSECUTIVE, n, size)


@njit(**OPTIONS)
def unpack_tile(scratch, at, out, row, num_rows, column):  # type: ignore[no-untyped-def]
    """A stored tile [16 neurons, 16 token rows] to the rows of `out` from `row` on."""
    transpose16(scratch, at)
    for r in range(min(ROWS, num_rows - row)):
        for n in range(ROWS):
            out[(row + r) * BLOCK + column + n] = scratch[at + r * ROWS + n]


def _tile_product(inputs, first_row, num_rows, size, weights, neuron, out, scratch):  # type: ignore[no-untyped-def]
    columns, tiles = min(num_rows, ROWS), (num_rows + ROWS - 1) // ROWS
    pairs, stride, weight_stride = inputs.pairs, columns * 4, size * 2
    upper, lower = neuron * size, (neuron + ROWS) * size
    half = size // 2
    following_block = upper + BLOCK * size
    for tile in range(first_row // ROWS, tiles, 2):
        at = tile * half * columns
        clear(0)
        clear(1)
        if tile + 1 == tiles:
            for k in range(0, half, 16):
                if tile == first_row // ROWS:
                    for line in range(BLOCK):
                        prefetch(weights, following_block + (k * 2 + line) * BLOCK)
                load(6, pairs, at + k * columns, stride)
                load(4, weights, upper + 2 * k, weight_stride)
                multiply_bfloat16(0, 4, 6)
                load(5, weights, lower + 2 * k, weight_stride)
                multiply_bfloat16(1, 5, 6)
            if columns == 1:
                store(0, out, 0, 4)
                store(1, out, ROWS, 4)
                return
        else:
            following = at + half * columns
            clear(2)
            clear(3)
            for k in range(0, half, 16):
                load(6, pairs, at + k * columns, stride)
                load(4, weights, upper + 2 * k, weight_stride)
                load(7, pairs, following + k * columns, stride)
                multiply_bfloat16(0, 4, 6)
                load(5, weights, lower + 2 * k, weight_stride)
                multiply_bfloat16(2, 4, 7)
                multiply_bfloat16(1, 5, 6)
                multiply_bfloat16(3, 5, 7)
            store(2, scratch, 512, ROW_BYTES)
            store(3, scratch, 768, ROW_BYTES)
            unpack_tile(scratch, 512, out, (tile + 1) * ROWS, num_rows, 0)
            unpack_tile(scratch, 768, out, (tile + 1) * ROWS, num_rows, ROWS)
        store(0, scratch, 0, ROW_BYTES)
        store(1, scratch, 256, ROW_BYTES)
        unpack_tile(scratch, 0, out, tile * ROWS, num_rows, 0)
        unpack_tile(scratch, 256, out, tile * ROWS, num_rows, ROWS)
