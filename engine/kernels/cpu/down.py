"""The product by `down`, whose rows are neurons: out[r] += sum over neurons j of h[r, j] * down[j], for some columns.

With AMX, 16 token rows of h are one operand as they lie in memory; the other is made from pairs of neuron rows on the
way. Without, rows of `down` are scaled and added. Terms are added in the order of neurons whatever the batch is.
"""

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray

from engine.kernels.cpu.math import from_bfloat16, narrow
from engine.kernels.cpu.options import OPTIONS
from engine.kernels.cpu.product import BLOCK, tile_columns
from engine.kernels.cpu.rows import add_listed_pairs, add_listed_rows, add_rows_4, interleave32, prefetch
from engine.kernels.cpu.tiles import ROW_BYTES, ROWS, clear, load, multiply_bfloat16, store, tile_config

PANEL = 256  # neurons whose rows are interleaved before many token rows use them: 16 KiB
_FOUR = np.arange(4)


def down_tiles(rows: int) -> NDArray[np.uint8]:
    """Shapes of tiles: 0 and 1 are sums [token rows, 16 columns], 4 token rows, 6 and 7 weights."""
    height = tile_columns(rows)
    sums, inputs, weights = (height, ROW_BYTES), (height, ROW_BYTES), (ROWS, ROW_BYTES)
    return tile_config({0: sums, 1: sums, 4: inputs, 6: weights, 7: weights})


def multiply_down(h, rows, intermediate, down, hidden, first, last, totals, panel):  # type: ignore[no-untyped-def]
    """totals[r * hidden + place] = sum over j of h[r, j] * down[j, k], k in [first, last) (for use in kernels only).

    Args:
        h: [rows16 * intermediate], act(gate) * up of rows, padded to 16; bfloat16 bits for AMX, or float32.
        rows: Token rows.
        intermediate: A multiple of 32.
        down: [intermediate * hidden], bfloat16 bits or float32.
        hidden: Columns of `down`.
        first, last: Multiples of 32.
        totals: float32 [rows16 * hidden]; with AMX in the order of columns, else in that of `rows.place_of`.
        panel: Scratch, uint32 [8192].
    """
    raise NotImplementedError


@overload(multiply_down)
def _multiply_down(h, rows, intermediate, down, hidden, first, last, totals, panel):  # type: ignore[no-untyped-def]
    if not isinstance(h, types.Array):
        return None
    return _tile_down if h.dtype == types.uint16 else _plain_down


def keep_hidden(h, row, intermediate, first, values):  # type: ignore[no-untyped-def]
    """Keep values, float32 act(gate) * up of neurons from `first` on, as row `row` of h (for use in kernels only)."""
    raise NotImplementedError


@overload(keep_hidden)
def _keep_hidden(h, row, intermediate, first, values):  # type: ignore[no-untyped-def]
    if not isinstance(h, types.Array):
        return None

    def keep(h, row, intermediate, first, values):  # type: ignore[no-untyped-def]
        target = h[row * intermediate + first : row * intermediate + first + values.size]
        for n in range(values.size):
            target[n] = narrow(values[n], h)

    return keep


def _plain_down(h, rows, intermediate, down, hidden, first, last, totals, panel):  # type: ignore[no-untyped-def]
    width = last - first
    for start in range(0, rows, ROWS):  # whose totals stay in the first-level cache
        end = min(start + ROWS, rows)
        for r in range(start, end):
            totals[r * hidden + first : r * hidden + last] = 0
        for j in range(0, intermediate, 4):
            for r in range(start, end):
                at = r * intermediate + j
                add_rows_4(totals, r * hidden + first, h, at, down, j * hidden + first, _FOUR, 0, hidden, width)


def _tile_down(h, rows, intermediate, down, hidden, first, last, totals, panel):  # type: ignore[no-untyped-def]
    height = min(rows, ROWS)
    # Few token rows: go through memory row by row. Many: interleave a panel once for all of them.
    depth = BLOCK if rows <= ROWS else PANEL
    for j in range(0, intermediate, depth):
        steps = min(depth, intermediate - j) // BLOCK
        for k in range(first, last, BLOCK):
            for step in range(steps):
                for pair in range(ROWS):
                    at = (j + step * BLOCK + 2 * pair) * hidden + k
                    place = step * 512 + pair * ROWS
                    prefetch(down, at + depth * hidden)
                    prefetch(down, at + (depth + 1) * hidden)
                    interleave32(panel, place, place + 256, down, at, at + hidden)
            for row in range(0, rows, height):
                at = row * hidden + k
                if j == 0:
                    clear(0)
                    clear(1)
                else:
                    load(0, totals, at, 4 * hidden)
                    load(1, totals, at + ROWS, 4 * hidden)
                for step in range(steps):
                    load(4, h, row * intermediate + j + step * BLOCK, 2 * intermediate)
                    load(6, panel, step * 512, ROW_BYTES)
                    multiply_bfloat16(0, 4, 6)
                    load(7, panel, step * 512 + 256, ROW_BYTES)
                    multiply_bfloat16(1, 4, 7)
                store(0, totals, at, 4 * hidden)
                store(1, totals, at + ROWS, 4 * hidden)


def skip_down(h, rows, intermediate, down, hidden, first, last, totals, places, factors):  # type: ignore[no-untyped-def]
    """What `multiply_down` gives, to the last bit, without reading rows of `down` that only meet zeros.

    For use in kernels only. With AMX the order is that of its tiles: of 32 neurons the even ones are added up, the odd
    ones are, and then both; what is skipped adds 0. Totals are in the order of `rows.place_of`.

    Args:
        places: Scratch, int64 [66].
        factors: Scratch, float32 [66] (int32 for quantised weights, in a view).
    """
    raise NotImplementedError


@overload(skip_down)
def _skip_down(h, rows, intermediate, down, hidden, first, last, totals, places, factors):  # type: ignore[no-untyped-def]
    if not isinstance(h, types.Array):
        return None
    return _skip_down_pairs if h.dtype == types.uint16 else _skip_down_rows


@njit(**OPTIONS)
def _list_tile(h, row_at, tile, places, factors):  # type: ignore[no-untyped-def]
    """Neurons of a tile of 32 with h != 0, the even ones first; returns how many are even, and how many there are."""
    count = 0
    split = 0
    for parity in range(2):
        for j in range(tile + parity, tile + BLOCK, 2):
            value = from_bfloat16(h[row_at + j])
            places[count], factors[count] = j, value
            count += value != 0
        if parity == 0:
            split = count
    return split, count


def _skip_down_pairs(h, rows, intermediate, down, hidden, first, last, totals, places, factors):  # type: ignore[no-untyped-def]
    side = BLOCK + 1  # two lists in turn: rows of the next tile are fetched while those of this one are added
    for r in range(rows):
        row_at, at = r * intermediate, r * hidden + first
        totals[at : at + last - first] = 0
        split, count = _list_tile(h, row_at, 0, places, factors)
        for tile in range(0, intermediate, BLOCK):
            now = tile // BLOCK % 2 * side
            after = side - now
            next_split, next_count = 0, 0
            if tile + BLOCK < intermediate:
                next_split, next_count = _list_tile(h, row_at, tile + BLOCK, places[after:], factors[after:])
                for i in range(after, after + next_count):
                    for k in range(first, last, BLOCK):
                        prefetch(down, places[i] * hidden + k)
            if count > 0:
                add_listed_pairs(
                    totals, at, factors[now:], places[now:], split, count, down, first, hidden, last - first
                )
            split, count = next_split, next_count


def _skip_down_rows(h, rows, intermediate, down, hidden, first, last, totals, places, factors):  # type: ignore[no-untyped-def]
    for r in range(rows):
        totals[r * hidden + first : r * hidden + last] = 0
        for tile in range(0, intermediate, BLOCK):
            count = 0
            for j in range(tile, tile + BLOCK):
                value = h[r * intermediate + j]
                places[count], factors[count] = j, value
                count += value != 0
            at = r * hidden + first
            add_listed_rows(totals, at, factors, places, 0, count, down, first, hidden, last - first)
