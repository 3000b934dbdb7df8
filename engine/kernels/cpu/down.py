"""The product by `down`, whose rows are neurons: out[r] += sum over neurons j of h[r, j] * down[j].

With AMX, 16 token rows of h are one operand as they lie in memory; the other is made from pairs of neuron rows on the
way. Without, rows of `down` are scaled and added. Each function computes some neurons and some columns; terms are added
in the order of neurons whatever the batch is.
"""

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray

from engine.kernels.cpu.math import from_bfloat16
from engine.kernels.cpu.options import FEW_ROWS, INNER
from engine.kernels.cpu.product import BLOCK, TOKEN_ROWS, tile_columns
from engine.kernels.cpu.rows import (
    FETCHED,
    FEW,
    SUMMED,
    add_chunk,
    add_in_place_order,
    add_listed_pairs,
    add_listed_rows,
    add_row,
    add_rows_4,
    add_scaled_alone,
    add_scaled_paired,
    add_scaled_together,
    fetch,
    interleave32,
    narrow_chunk,
    prefetch,
)
from engine.kernels.cpu.tiles import ROW_BYTES, ROWS, clear, load, multiply_bfloat16, store, tile_config

PANEL = 256  # neurons whose rows are interleaved before many token rows use them,
PANEL_COLUMNS = 320  # for so many columns at most: 160 KiB
AHEAD = 128  # neurons whose rows are on their way while others are added, where tokens share what is fetched
STRIP = 128  # neurons that are multiplied with `TOKEN_ROWS` without AMX, whose values stay in caches,
SHORT_STRIP = 32  # and with few, which wait for the next strip
# Without AMX the neurons are cut in so many parts, whatever the batch and the number of threads, and `out` takes in the
# sum of each part in order. So threads may share out parts where rows are few, and each reads whole rows of weights.
NEURON_PARTS = 4
_PAIR_BYTES = 2 * ROW_BYTES  # between rows of two tiles of sums that lie side by side


def down_tiles(rows: int) -> NDArray[np.uint8]:
    """Shapes of tiles: 0 to 3 are sums [token rows, 16 columns], 4 and 5 token rows, 6 and 7 weights."""
    height = tile_columns(rows)
    sums, inputs, weights = (height, ROW_BYTES), (height, ROW_BYTES), (ROWS, ROW_BYTES)
    return tile_config({**dict.fromkeys(range(4), sums), 4: inputs, 5: inputs, 6: weights, 7: weights})


def column_unit(h):  # type: ignore[no-untyped-def]
    """Columns of `down` that one thread must compute together (for use in kernels only)."""
    raise NotImplementedError


@overload(column_unit)
def _column_unit(h):  # type: ignore[no-untyped-def]
    return (lambda h: BLOCK) if isinstance(h, types.Array) else None


def neuron_parts(h):  # type: ignore[no-untyped-def]
    """In how many parts the neurons of h are summed (for use in kernels only)."""
    raise NotImplementedError


@overload(neuron_parts)
def _neuron_parts(h):  # type: ignore[no-untyped-def]
    if not isinstance(h, types.Array):
        return None
    parts = 1 if h.dtype == types.uint16 else NEURON_PARTS
    return lambda h: parts


@njit(inline="always")
def hidden_place(row, j, intermediate, width):  # type: ignore[no-untyped-def]
    """Where h[row, j] lies in tiles of 16 rows and `width` neurons, each contiguous."""
    return (row // ROWS * intermediate + j // width * width) * ROWS + row % ROWS * width + j % width


def multiply_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, panel, out):  # type: ignore[no-untyped-def]
    """out[r * hidden + k] += sum of h[r, j] * down[j, k], j in [begin, end), k in [first, last) (in kernels only).

    Args:
        h: [rows16 * intermediate], act(gate) * up of rows padded to 16, from `keep_hidden`.
        rows: Token rows.
        intermediate: A multiple of 32.
        down: [intermediate * hidden], bfloat16 bits or float32.
        hidden: Columns of `down`.
        begin, end: One of the `neuron_parts`; multiples of 32.
        first, last: Multiples of the `column_unit`.
        totals: Scratch, float32 [rows16 * hidden].
        panel: Scratch, uint32 [PANEL * PANEL_COLUMNS / 2].
        out: float32 [rows * hidden].
    """
    raise NotImplementedError


@overload(multiply_down)
def _multiply_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, panel, out):  # type: ignore[no-untyped-def]
    if not isinstance(h, types.Array):
        return None
    return _tile_down if h.dtype == types.uint16 else _plain_down


def keep_hidden(h, row, intermediate, first, values):  # type: ignore[no-untyped-def]
    """Keep values, float32 act(gate) * up of whole blocks of neurons from `first` on, as row `row` of h (in kernels).

    AMX takes bfloat16 in tiles, see `hidden_place`; vectors take float32 rows.
    """
    raise NotImplementedError


@overload(keep_hidden)
def _keep_hidden(h, row, intermediate, first, values):  # type: ignore[no-untyped-def]
    if not isinstance(h, types.Array):
        return None
    return _keep_tile_row if h.dtype == types.uint16 else _keep_row


def _keep_tile_row(h, row, intermediate, first, values):  # type: ignore[no-untyped-def]
    for j in range(0, values.size, BLOCK):
        narrow_chunk(h, hidden_place(row, first + j, intermediate, BLOCK), values, j)


def _keep_row(h, row, intermediate, first, values):  # type: ignore[no-untyped-def]
    place = row * intermediate + first
    for j in range(values.size):  # Numba would check the sizes of slices, and compile a message about them
        h[place + j] = values[j]


@njit(**INNER)
def add_in_order(totals, rows, hidden, first, last, down, out):  # type: ignore[no-untyped-def]
    """out += totals [rows][hidden], columns in the order of `rows.place_of`."""
    for r in range(rows):
        for k in range(r * hidden + first, r * hidden + last, BLOCK):
            add_in_place_order(out, k, totals, k, down)


def _plain_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, panel, out):  # type: ignore[no-untyped-def]
    if rows <= FEW:
        for r in range(rows):
            totals[r * hidden + first : r * hidden + last] = 0
        for j in range(begin, end):  # in the order of memory
            fetch(down, (j + FETCHED) * hidden + first, last - first)
            for r in range(rows):
                add_row(totals, r * hidden + first, h, r * intermediate + j, down, j * hidden + first, last - first)
    else:
        summed = max(rows, SUMMED)  # memory has 16 rows; what is computed for those that do not exist is not read
        strip = SHORT_STRIP if rows <= FEW_ROWS else STRIP
        for r in range(summed):
            totals[r * hidden + first : r * hidden + last] = 0
        for top in range(0, summed, TOKEN_ROWS):
            bottom = min(top + TOKEN_ROWS, summed)
            for j in range(begin, end, strip):
                count = min(strip, end - j)
                for k in range(first, last, BLOCK):
                    if rows <= FEW_ROWS:
                        _fetch_strip(down, j + count, count, hidden, first, last, k)
                    _add_strip(h, top, bottom, intermediate, j, count, down, hidden, k, totals)
    add_in_order(totals, rows, hidden, first, last, down, out)


@njit(**INNER)
def _fetch_strip(down, j, count, hidden, first, last, k):  # type: ignore[no-untyped-def]
    """Fetch what the columns from k on have to of a strip of neurons from j on, in the order of memory."""
    width = last - first
    for line in range(count * (k - first) // width, count * (k - first + BLOCK) // width):
        fetch(down, (j + line) * hidden + first, width)


@njit(**INNER)
def _cut_rows(first, last):  # type: ignore[no-untyped-def]
    """Of rows first to last - 1, where those end that are taken `SUMMED` at a time, and where those by `FEW`."""
    paired = first + (last - first) // SUMMED * SUMMED
    return paired, paired + (last - paired) // FEW * FEW


@njit(**INNER)
def _add_strip(h, top, bottom, intermediate, j, count, down, hidden, k, totals):  # type: ignore[no-untyped-def]
    """totals[r, k : k + 32] += sum over `count` neurons from j on of h[r, j] * down[j], top <= r < bottom."""
    weights = j * hidden + k
    paired, alone = _cut_rows(top, bottom)
    for r in range(top, paired, SUMMED):
        place, at = r * hidden + k, r * intermediate + j
        add_scaled_together(totals, place, hidden, h, at, intermediate, down, weights, hidden, count)
    for r in range(paired, alone, FEW):
        place, at = r * hidden + k, r * intermediate + j
        add_scaled_paired(totals, place, hidden, h, at, intermediate, down, weights, hidden, count)
    for r in range(alone, bottom):
        place, at = r * hidden + k, r * intermediate + j
        add_scaled_alone(totals, place, hidden, h, at, intermediate, down, weights, hidden, count)


def _tile_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, panel, out):  # type: ignore[no-untyped-def]
    if rows <= ROWS:
        _few_rows(h, down, hidden, begin, end, first, last, totals, panel)
    else:
        _many_rows(h, rows, intermediate, down, hidden, begin, end, first, last, totals, panel)
    for r in range(rows):
        for k in range(first, last, BLOCK):
            at = _total_place(r, k, hidden)
            add_chunk(out, r * hidden + k, totals, at)


@njit(inline="always")
def _total_place(row, column, hidden):  # type: ignore[no-untyped-def]
    """Where AMX puts the totals of a row: pairs of tiles [16 rows][32 columns], each pair contiguous."""
    return (row // ROWS * hidden + column) * ROWS + row % ROWS * BLOCK


@njit(inline="always")
def _interleave(down, at, ahead, hidden, panel, place):  # type: ignore[no-untyped-def]
    """32 columns of 32 neurons from `at` on to two tiles of pairs; fetches what comes `ahead` of them."""
    for pair in range(ROWS):
        even, words = at + 2 * pair * hidden, place + pair * ROWS
        prefetch(down, even + ahead)
        prefetch(down, even + ahead + hidden)
        interleave32(panel, words, words + 256, down, even, even + hidden)


@njit(inline="always")
def _start_sums(totals, at, fresh):  # type: ignore[no-untyped-def]
    """Tiles 0 and 1: 0, or what they held when they were stored at this place."""
    if fresh:
        clear(0)
        clear(1)
    else:
        load(0, totals, at, _PAIR_BYTES)
        load(1, totals, at + ROWS, _PAIR_BYTES)


@njit(inline="always")
def _multiply_step(h, h_at, panel, at):  # type: ignore[no-untyped-def]
    """Add 32 neurons of 16 token rows to tiles 0 and 1; leaves their two tiles of weights in 6 and 7."""
    load(4, h, h_at, ROW_BYTES)
    load(6, panel, at, ROW_BYTES)
    multiply_bfloat16(0, 4, 6)
    load(7, panel, at + 256, ROW_BYTES)
    multiply_bfloat16(1, 4, 7)


@njit(inline="always")
def _store_sums(totals, at):  # type: ignore[no-untyped-def]
    store(0, totals, at, _PAIR_BYTES)
    store(1, totals, at + ROWS, _PAIR_BYTES)


@njit(**INNER)
def _few_rows(h, down, hidden, begin, end, first, last, totals, panel):  # type: ignore[no-untyped-def]
    """Up to 16 token rows: goes through `down` as it lies in memory."""
    for j in range(begin, end, BLOCK):
        for k in range(first, last, BLOCK):
            _interleave(down, j * hidden + k, BLOCK * hidden, hidden, panel, 0)
            at = k * ROWS
            _start_sums(totals, at, j == begin)
            _multiply_step(h, j * ROWS, panel, 0)
            _store_sums(totals, at)


@njit(**INNER)
def _many_rows(h, rows, intermediate, down, hidden, begin, end, first, last, totals, panel):  # type: ignore[no-untyped-def]
    """Interleaves a panel of `down` once for all token rows."""
    for j in range(begin, end, PANEL):
        steps = min(PANEL, end - j) // BLOCK
        for left in range(first, last, PANEL_COLUMNS):
            right = min(left + PANEL_COLUMNS, last)
            for step in range(steps):
                for k in range(left, right, BLOCK):
                    place = ((k - left) // BLOCK * steps + step) * 512
                    _interleave(down, (j + step * BLOCK) * hidden + k, PANEL * hidden, hidden, panel, place)
            for row in range(0, rows, 2 * ROWS):
                for k in range(left, right, BLOCK):
                    begin = (k - left) // BLOCK * steps * 512
                    at, source = (row * hidden + k * ROWS), row * intermediate + j * ROWS
                    _start_sums(totals, at, j == begin)
                    if row + ROWS >= rows:
                        for step in range(steps):
                            _multiply_step(h, source + step * 512, panel, begin + step * 512)
                    else:
                        below, following = at + ROWS * hidden, source + ROWS * intermediate
                        if j == begin:
                            clear(2)
                            clear(3)
                        else:
                            load(2, totals, below, _PAIR_BYTES)
                            load(3, totals, below + ROWS, _PAIR_BYTES)
                        for step in range(steps):
                            _multiply_step(h, source + step * 512, panel, begin + step * 512)
                            load(5, h, following + step * 512, ROW_BYTES)
                            multiply_bfloat16(2, 5, 6)
                            multiply_bfloat16(3, 5, 7)
                        store(2, totals, below, _PAIR_BYTES)
                        store(3, totals, below + ROWS, _PAIR_BYTES)
                    _store_sums(totals, at)


def skip_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, places, factors, out):  # type: ignore[no-untyped-def]
    """What `multiply_down` gives, to the last bit, without reading rows of `down` that only meet zeros.

    For use in kernels only. With AMX the order is that of its tiles: of 32 neurons the even ones are added up, the odd
    ones are, and then both; what is skipped adds 0.

    Args:
        places: Scratch, int64 [intermediate + 66].
        factors: Scratch, float32 [66] (int32 for quantised weights, in a view).
    """
    raise NotImplementedError


@overload(skip_down)
def _skip_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, places, factors, out):  # type: ignore[no-untyped-def]
    if not isinstance(h, types.Array):
        return None
    return _skip_down_pairs if h.dtype == types.uint16 else _skip_down_rows


@njit(**INNER)
def _list_tile(h, row, tile, intermediate, places, factors):  # type: ignore[no-untyped-def]
    """Neurons of a tile of 32 with h != 0, the even ones first; returns how many are even, and how many there are."""
    count = 0
    split = 0
    at = hidden_place(row, tile, intermediate, BLOCK)
    for parity in range(2):
        for j in range(parity, BLOCK, 2):
            value = from_bfloat16(h[at + j])
            places[count], factors[count] = tile + j, value
            count += value != 0
        if parity == 0:
            split = count
    return split, count


def mark_active(h, rows, intermediate, tile, marks):  # type: ignore[no-untyped-def]
    """marks[j] != 0 where some row has h != 0 at neuron tile + j, j < len(marks) (for use in kernels only)."""
    raise NotImplementedError


@overload(mark_active)
def _mark_active(h, rows, intermediate, tile, marks):  # type: ignore[no-untyped-def]
    if not isinstance(h, types.Array):
        return None
    tiles = h.dtype == types.uint16

    def mark(h, rows, intermediate, tile, marks):  # type: ignore[no-untyped-def]
        marks[:] = 0
        for r in range(rows):
            at = hidden_place(r, tile, intermediate, BLOCK) if tiles else r * intermediate + tile
            for j in range(marks.size):
                marks[j] |= h[at + j] != 0

    return mark


@njit(**INNER)
def fetch_active(h, rows, intermediate, tile, marks, down, hidden, first, last):  # type: ignore[no-untyped-def]
    """Fetch the columns from first to last of rows of `down` that tokens use, of len(marks) neurons from `tile` on."""
    if tile >= intermediate:
        return
    mark_active(h, rows, intermediate, tile, marks)
    for j in range(marks.size):
        if marks[j]:
            fetch(down, (tile + j) * hidden + first, last - first)


def _skip_down_pairs(h, rows, intermediate, down, hidden, begin, end, first, last, totals, places, factors, out):  # type: ignore[no-untyped-def]
    marks, width = np.empty(BLOCK, np.uint8), last - first
    for tile in range(begin, begin + AHEAD, BLOCK):
        fetch_active(h, rows, intermediate, tile, marks, down, hidden, first, last)
    for r in range(rows):
        totals[r * hidden + first : r * hidden + last] = 0
    for tile in range(begin, end, BLOCK):
        fetch_active(h, rows, intermediate, tile + AHEAD, marks, down, hidden, first, last)
        for r in range(rows):
            split, count = _list_tile(h, r, tile, intermediate, places, factors)
            if count > 0:
                add_listed_pairs(totals, r * hidden + first, factors, places, split, count, down, first, hidden, width)
    add_in_order(totals, rows, hidden, first, last, down, out)


@njit(**INNER)
def _add_active(h, begin, end, down, hidden, first, width, totals, places, factors):  # type: ignore[no-untyped-def]
    """totals[first + k] += sum of h[j] * down[j, first + k], k < width, over neurons from begin to end with h != 0.

    Four of them meet a piece of the totals that is in registers.
    """
    count = 0
    for j in range(begin, end):
        places[count] = j
        count += h[j] != 0
    for i in range(min(FETCHED, count)):
        fetch(down, places[i] * hidden + first, width)
    fours = count // 4 * 4
    for i in range(0, fours, 4):
        for n in range(4):
            factors[n] = h[places[i + n]]
            if i + n + FETCHED < count:
                fetch(down, places[i + n + FETCHED] * hidden + first, width)
        add_rows_4(totals, first, factors, 0, down, first, places, i, hidden, width)
    for i in range(fours, count):
        add_row(totals, first, h, places[i], down, places[i] * hidden + first, width)


@njit(**INNER)
def _add_active_tiles(h, rows, intermediate, down, hidden, begin, end, first, last, totals, places, factors):  # type: ignore[no-untyped-def]
    """`_add_active` of several token rows, which share what is fetched, 32 neurons at a time."""
    marks, width = np.empty(BLOCK, np.uint8), last - first
    for tile in range(begin, end, BLOCK):
        fetch_active(h, rows, intermediate, tile + AHEAD, marks, down, hidden, first, last)
        for r in range(rows):
            count = 0
            for j in range(tile, tile + BLOCK):
                value = h[r * intermediate + j]
                places[count], factors[count] = j, value
                count += value != 0
            add_listed_rows(totals, r * hidden + first, factors, places, 0, count, down, first, hidden, width)


def _skip_down_rows(h, rows, intermediate, down, hidden, begin, end, first, last, totals, places, factors, out):  # type: ignore[no-untyped-def]
    for r in range(rows):
        totals[r * hidden + first : r * hidden + last] = 0
    if rows == 1:
        _add_active(h, begin, end, down, hidden, first, last - first, totals, places, factors)
    else:
        _add_active_tiles(h, rows, intermediate, down, hidden, begin, end, first, last, totals, places, factors)
    add_in_order(totals, rows, hidden, first, last, down, out)
