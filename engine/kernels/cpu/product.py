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

from engine.kernels.cpu.options import INNER
from engine.kernels.cpu.rows import (
    NEURONS,
    ORDERED,
    TOKENS,
    dots_in_order,
    dots_together,
    narrow_chunk,
    place_of,
    prefetch,
    transpose16,
)
from engine.kernels.cpu.tiles import ROW_BYTES, ROWS, clear, load, multiply_bfloat16, store, tile_config

BLOCK = 32  # neurons that are multiplied together
TOKEN_ROWS = 128  # likewise, so many that all of their values stay in the caches of a core
STREAMED = 32  # up to which vectors wait for weights, and so the first of them read in order

_CONSECUTIVE = np.arange(2 * BLOCK)  # of two blocks: while one is multiplied, the next is fetched
_QUARTERS, _SIDE = 4, 1024  # tiles of sums of 32 neurons and 32 rows; floats of them all


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
    values = np.empty(x.size, np.uint16)
    for k in range(0, x.size, BLOCK):
        narrow_chunk(values, k, x, k)
    pairs = values.view(np.uint32)
    for k in range(half):
        inputs.pairs[at + k * columns] = pairs[k]


def _pack_plain_row(row, x, num_rows, inputs, weights):  # type: ignore[no-untyped-def]
    for k in range(x.size):
        inputs.values[row * x.size + place_of(k, weights)] = x[k]


def rows_together(inputs):  # type: ignore[no-untyped-def]
    """How many rows one thread lays out: those of a tile share cache lines (for use in kernels only)."""
    raise NotImplementedError


@overload(rows_together)
def _rows_together(inputs):  # type: ignore[no-untyped-def]
    if is_kind(inputs, TileRows):
        return lambda inputs: ROWS
    return (lambda inputs: 1) if is_kind(inputs, PlainRows) else None


def pack_tile(first, block, num_rows, inputs, weights):  # type: ignore[no-untyped-def]
    """Lay rows `first` to first + len(block) - 1 out (for use in kernels only).

    Args:
        first: A multiple of `rows_together`.
        block: float32 [up to `rows_together`, in].
    """
    raise NotImplementedError


@overload(pack_tile)
def _pack_tile(first, block, num_rows, inputs, weights):  # type: ignore[no-untyped-def]
    return _pack_whole_tile if is_kind(inputs, TileRows) else _pack_row_by_row


def _pack_row_by_row(first, block, num_rows, inputs, weights):  # type: ignore[no-untyped-def]
    for r in range(block.shape[0]):
        pack_row(first + r, block[r], num_rows, inputs, weights)


def _pack_whole_tile(first, block, num_rows, inputs, weights):  # type: ignore[no-untyped-def]
    if block.shape[0] < ROWS:
        for r in range(block.shape[0]):
            pack_row(first + r, block[r], num_rows, inputs, weights)
        return
    size, values = block.shape[1], np.empty(block.size, np.uint16)
    for r in range(ROWS):
        for k in range(0, size, BLOCK):
            narrow_chunk(values, k * ROWS + r * BLOCK, block[r], k)
    pairs = values.view(np.uint32)  # [in / 32][16 token rows][16]
    for at in range(0, pairs.size, ROWS * ROWS):
        transpose16(pairs, at, inputs.pairs, first * size // 2 + at, ROWS)


def product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    """out[at + (r - first) * stride + n] = dot(row r, weights[neuron + n]) for n < 32 and rows first <= r < last.

    For use in kernels only.

    Args:
        inputs: Packed rows.
        rows: How many are packed.
        first: A multiple of 16.
        last: At most `rows`.
        size: `in`, a multiple of 32.
        weights: [out * in], float32 or bfloat16 bits.
        neuron: First of the 32.
        out: float32.
        at, stride: Where the result goes.
        scratch: float32 [2048].
    """
    raise NotImplementedError


@overload(product)
def _product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    if is_kind(inputs, TileRows):
        return _tile_product
    return _plain_product if is_kind(inputs, PlainRows) else None


def _plain_product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    multiply_listed(inputs.values, first, last, size, weights, neuron * size, _CONSECUTIVE, 0, out, at, stride)


@njit(**INNER)
def _multiply_cached(x, x_at, size, weights, base, places, listed, out, at, stride):  # type: ignore[no-untyped-def]
    """Of `TOKENS` rows. A function of its own: as a part of the loop below its sums would not stay in registers."""
    for n in range(0, BLOCK, NEURONS):
        dots_together(out, at + n, stride, x, x_at, size, weights, base, places, listed + n, size)


@njit(**INNER)
def multiply_listed(x, first, last, size, weights, base, places, listed, out, at, stride):  # type: ignore[no-untyped-def]
    """`product` with vectors, of neurons places[listed : listed + 32] from weights[base] on.

    The places after these are those of neurons that may be read next, whatever they hold. Token rows are taken a few at
    a time: they stay in the first-level cache, and the 32 rows of weights in the second.
    """
    row = first
    while row < last:
        left, target = last - row, at + (row - first) * stride
        some = TOKENS if left > 2 * ORDERED else left if left <= ORDERED else (left + 1) // 2
        if some == TOKENS and (row > first or left > STREAMED):
            _multiply_cached(x, row * size, size, weights, base, places, listed, out, target, stride)
        else:
            dots_in_order(some, BLOCK, out, target, stride, x, row * size, size, weights, base, places, listed, size)
        row += some


@njit(**INNER)
def lines_each(rows):  # type: ignore[no-untyped-def]
    """Of 32 lines, those that each 32 of `rows` token rows fetch."""
    parts = (rows + BLOCK - 1) // BLOCK
    return (BLOCK + parts - 1) // parts


@njit(**INNER)
def unpack_tile(stored, stored_at, count, out, at, stride):  # type: ignore[no-untyped-def]
    """A stored tile [16 neurons, 16 token rows], of which `count` rows exist, to rows of `out` that begin at `at`."""
    if count >= ROWS:
        transpose16(stored, stored_at, out, at, stride)
        return
    transpose16(stored, stored_at, stored, stored_at, ROWS)
    for r in range(count):
        for n in range(ROWS):
            out[at + r * stride + n] = stored[stored_at + r * ROWS + n]


@njit(**INNER)
def _unpack_quarter(quarter, stored, stored_at, row, last, out, at, stride):  # type: ignore[no-untyped-def]
    """One of the four stored tiles of 32 neurons and rows from `row` on, of which those before `last` exist."""
    half = quarter // 2 * ROWS
    if row + half < last:
        place = at + half * stride + quarter % 2 * ROWS
        unpack_tile(stored, stored_at + quarter * ROWS * ROWS, last - row - half, out, place, stride)


def _tile_product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    columns, pairs, half = min(rows, ROWS), inputs.pairs, size // 2
    width, weight_stride = columns * 4, size * 2
    upper, lower, next_block = neuron * size, (neuron + ROWS) * size, (neuron + BLOCK) * size
    # What the next block of neurons needs is fetched a share at a time, so that memory is busy all the while. So are
    # vector units: they unpack the sums of 32 rows while tiles multiply the next 32.
    share = lines_each(rows)
    unpacked, stored = _QUARTERS, 0
    for row in range(first, last, BLOCK):
        place, before, target = row * half, row - BLOCK, at + (row - BLOCK - first) * stride
        fetch = min(row // BLOCK * share, BLOCK)
        fetch_end = min(fetch + share, BLOCK)
        clear(0)
        clear(1)
        if row + ROWS >= last:
            for k in range(0, half, 16):
                for line in range(fetch, fetch_end):
                    prefetch(weights, next_block + (k * 2 + line) * BLOCK)
                load(6, pairs, place + k * columns, width)
                load(4, weights, upper + 2 * k, weight_stride)
                multiply_bfloat16(0, 4, 6)
                load(5, weights, lower + 2 * k, weight_stride)
                multiply_bfloat16(1, 5, 6)
                if unpacked < _QUARTERS:
                    _unpack_quarter(unpacked, scratch, stored, before, last, out, target, stride)
                    unpacked += 1
            if columns == 1:
                store(0, out, at, 4)
                store(1, out, at + ROWS, 4)
                return
        else:
            following = place + half * ROWS
            clear(2)
            clear(3)
            for k in range(0, half, 16):
                for line in range(fetch, fetch_end):
                    prefetch(weights, next_block + (k * 2 + line) * BLOCK)
                load(6, pairs, place + k * ROWS, ROW_BYTES)
                load(4, weights, upper + 2 * k, weight_stride)
                load(7, pairs, following + k * ROWS, ROW_BYTES)
                multiply_bfloat16(0, 4, 6)
                load(5, weights, lower + 2 * k, weight_stride)
                multiply_bfloat16(2, 4, 7)
                multiply_bfloat16(1, 5, 6)
                multiply_bfloat16(3, 5, 7)
                if unpacked < _QUARTERS:
                    _unpack_quarter(unpacked, scratch, stored, before, last, out, target, stride)
                    unpacked += 1
        for quarter in range(unpacked, _QUARTERS):  # of a short sum
            _unpack_quarter(quarter, scratch, stored, before, last, out, target, stride)
        stored = _SIDE - stored
        store(0, scratch, stored, ROW_BYTES)
        store(1, scratch, stored + 256, ROW_BYTES)
        if row + ROWS < last:
            store(2, scratch, stored + 512, ROW_BYTES)
            store(3, scratch, stored + 768, ROW_BYTES)
        unpacked = 0
    row = first + (last - 1 - first) // BLOCK * BLOCK
    for quarter in range(_QUARTERS):
        _unpack_quarter(quarter, scratch, stored, row, last, out, at + (row - first) * stride, stride)
