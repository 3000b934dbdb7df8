"""Paged attention by AMX, for caches of bfloat16 whose heads are a multiple of 32 wide.

Queries and softmax numerators are rounded to bfloat16 on their way into tiles, sums are float32. Of one layer's cache

    keys    [num_blocks, num_kv_heads, head_dim / 2, 16, 2]    pairs of dimensions of 16 tokens
    values  [num_blocks, num_kv_heads, 8, head_dim, 2]         pairs of tokens

are operands as they lie in memory. Rows of a prompt that follow each other share what is read. Blocks of 16 tokens
are added one after another, with zeros for tokens that a row does not see: a row has the same bits in any batch.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from engine.kernels.cpu.attention import dealt
from engine.kernels.cpu.options import INNER, OPTIONS
from engine.kernels.cpu.rows import narrow_vector
from engine.kernels.cpu.simd import exponentials, vector_max
from engine.kernels.cpu.tiles import (
    ROW_BYTES,
    ROWS,
    clear,
    configure,
    load,
    multiply_bfloat16,
    release,
    store,
    tile_config,
)
from engine.kv_cache import BLOCK_SIZE as BLOCK

STEP = 32  # dimensions of a head that are multiplied at once
QUERY_ROWS = 48  # rows of queries (token rows times heads that share keys) that are computed together, if they can be

_TILE = ROWS * BLOCK


def attention_tiles() -> NDArray[np.uint8]:
    """Shapes of tiles: 0 and 1 sums, 4 queries, 5 numerators, 6 keys, 7 values."""
    whole = (ROWS, ROW_BYTES)
    return tile_config({0: whole, 1: whole, 4: whole, 5: (ROWS, 2 * BLOCK), 6: whole, 7: (BLOCK // 2, ROW_BYTES)})


@njit(**OPTIONS)
def list_pieces(sequence, positions, group, pieces):  # type: ignore[no-untyped-def]
    """Cut token rows into pieces that follow each other in one sequence.

    Args:
        sequence: int32 [rows], each row's sequence.
        positions: int64 [rows].
        group: Query heads for each key-value head.
        pieces: Out, int64 [rows + 1], first row of each piece, and behind them the number of rows.

    Returns:
        How many pieces there are.
    """
    most = max(1, QUERY_ROWS // group)
    count = 0
    for row in range(positions.size):
        follows = row > 0 and sequence[row] == sequence[row - 1] and positions[row] == positions[row - 1] + 1
        if not follows or row - pieces[count - 1] == most:
            pieces[count] = row
            count += 1
    pieces[count] = positions.size
    return count


@njit(**INNER)
def _pack_queries(queries, first, last, head, group, out):  # type: ignore[no-untyped-def]
    """Query heads from `head` on of rows first to last - 1, to bfloat16 [rows * group, head_dim]."""
    head_dim = queries.shape[2]
    flat = queries.reshape(-1)
    for row in range(first, last):
        source = (row * queries.shape[1] + head) * head_dim
        for d in range(0, group * head_dim, BLOCK):
            narrow_vector(out, (row - first) * group * head_dim + d, flat, source + d)


@njit(**INNER)
def _copy_written(values, at, written, head_dim, out):  # type: ignore[no-untyped-def]
    """A block of values whose first `written` tokens are there, with zeros for the others."""
    out[:] = 0
    for token in range(written):
        line = token // 2 * 2 * head_dim + token % 2
        for d in range(0, 2 * head_dim, 2):
            out[line + d] = values[at + line + d]


@njit(**OPTIONS)
def tile_attention(  # type: ignore[no-untyped-def]
    share, shares, queries, keys, values, block_tables, row_sequence, positions, window, pieces, num_pieces, config, out
):
    """`attention.paged_attention` by tiles.

    Args:
        keys, values: One layer's cache in the layout above, bfloat16 bits.
        pieces, num_pieces: From `list_pieces`.
        config: `attention_tiles()`.

    The other arguments are those of `paged_attention`; `out` is float32.
    """
    _, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    flat_keys, flat_values = keys.reshape(-1), values.reshape(-1)
    tasks = num_pieces * num_kv_heads
    for nth in range(tasks * share // shares, tasks * (share + 1) // shares):
        task = dealt(nth, tasks)
        piece, kv_head = task // num_kv_heads, task % num_kv_heads
        top, bottom = pieces[piece], pieces[piece + 1]
        last = positions[bottom - 1]
        first = max(0, positions[top] + 1 - window) if window > 0 else 0
        first_block, last_block = first // BLOCK, last // BLOCK
        blocks, written = last_block - first_block + 1, last + 1 - last_block * BLOCK
        span = blocks * BLOCK
        table = block_tables[row_sequence[top]]
        count = (bottom - top) * group
        tiles = (count + ROWS - 1) // ROWS

        configure(config)
        packed = np.zeros(tiles * ROWS * head_dim, np.uint16)
        _pack_queries(queries, top, bottom, kv_head * group, group, packed)
        scores = np.empty(tiles * ROWS * span, np.float32)
        for b in range(blocks):
            keys_at = (table[first_block + b] * num_kv_heads + kv_head) * head_dim * BLOCK
            for tile in range(tiles):
                clear(0)
                for d in range(0, head_dim, STEP):
                    load(4, packed, tile * ROWS * head_dim + d, 2 * head_dim)
                    load(6, flat_keys, keys_at + d * BLOCK, ROW_BYTES)
                    multiply_bfloat16(0, 4, 6)
                store(0, scores, tile * ROWS * span + b * BLOCK, 4 * span)

        numerators = np.zeros(tiles * ROWS * span, np.uint16)  # [tiles][blocks][16 rows][16 tokens]
        inverse = np.empty(count, np.float32)
        for i in range(count):
            position = positions[top + i // group]
            begin = max(0, position + 1 - window) if window > 0 else 0
            end = position + 1 - first_block * BLOCK
            scores[i * span : i * span + begin - first_block * BLOCK] = -np.inf
            scores[i * span + end : (i + 1) * span] = -np.inf
            largest = vector_max(scores, i * span, span)
            at = i // ROWS * blocks * _TILE + i % ROWS * BLOCK
            inverse[i] = np.float32(1) / exponentials(numerators, at, _TILE, scores, i * span, span, largest)

        tail = np.empty(BLOCK * head_dim, np.uint16)
        if written < BLOCK:  # other slots may hold anything, and 0 times that need not be 0
            at = (table[last_block] * num_kv_heads + kv_head) * BLOCK * head_dim
            _copy_written(flat_values, at, written, head_dim, tail)
        sums = np.empty(ROWS * STEP, np.float32)
        for tile in range(tiles):
            for d in range(0, head_dim, STEP):
                clear(0)
                clear(1)
                for b in range(blocks):
                    load(5, numerators, (tile * blocks + b) * _TILE, 2 * BLOCK)
                    if written < BLOCK and b == blocks - 1:
                        load(7, tail, 2 * d, 4 * head_dim)
                        multiply_bfloat16(0, 5, 7)
                        load(7, tail, 2 * (d + BLOCK), 4 * head_dim)
                        multiply_bfloat16(1, 5, 7)
                    else:
                        at = (table[first_block + b] * num_kv_heads + kv_head) * BLOCK * head_dim + 2 * d
                        load(7, flat_values, at, 4 * head_dim)
                        multiply_bfloat16(0, 5, 7)
                        load(7, flat_values, at + 2 * BLOCK, 4 * head_dim)
                        multiply_bfloat16(1, 5, 7)
                store(0, sums, 0, 2 * ROW_BYTES)
                store(1, sums, ROWS, 2 * ROW_BYTES)
                for i in range(tile * ROWS, min((tile + 1) * ROWS, count)):
                    target = (kv_head * group + i % group) * head_dim + d
                    line = out[top + i // group, target : target + STEP]
                    for j in range(STEP):
                        line[j] = sums[(i - tile * ROWS) * STEP + j] * inverse[i]
        release()
