"""Rotary embedding with cache write, and paged attention, one token row at a time.

Cache layout of one layer, so that both inner loops read whole vectors:

    keys    [num_blocks, num_kv_heads, head_dim, 16]    transposed inside a block
    values  [num_blocks, num_kv_heads, 16, head_dim]

A row's result depends on its query and on the cached tokens that it sees, added in the order of their positions: never
on how prompts were chunked or who shares the step. So a preempted request that is computed again gets the same bits.
"""

import numpy as np
from numba import njit

from engine.kernels.cpu.math import exp, narrow, widen
from engine.kernels.cpu.options import INNER, OPTIONS
from engine.kernels.cpu.rows import fetch
from engine.kernels.cpu.simd import HEADS, LANES, transposed_dots16, vector_max, vector_sum, weighted_rows16
from engine.kv_cache import BLOCK_SIZE as BLOCK

AHEAD = 4  # blocks whose keys or values are on their way while others are read


@njit(**INNER)
def _copy_head(source, at, head):  # type: ignore[no-untyped-def]
    """head[:] = source[at : at + len(head)] as float32."""
    for d in range(head.size):
        head[d] = widen(source[at + d])


@njit(**INNER)
def _normalise(head, weight, eps):  # type: ignore[no-untyped-def]
    """RMSNorm of one head in place; no-op without a weight."""
    if weight.size == 0:
        return
    total = np.float32(0)
    for d in range(head.size):
        total += head[d] * head[d]
    scale = np.float32(1) / np.sqrt(total / np.float32(head.size) + eps)
    for d in range(head.size):
        head[d] = head[d] * scale * weight[d]


@njit(**INNER)
def _rotate(head, cos, sin):  # type: ignore[no-untyped-def]
    """Rotary embedding of one head in place, first half against second half; no-op without angles."""
    half = cos.size
    for d in range(half):
        first, second = head[d], head[d + half]
        head[d] = first * cos[d] - second * sin[d]
        head[d + half] = second * cos[d] + first * sin[d]


@njit(**INNER)
def _keep_key(head, slot, kv_head, paired, keys):  # type: ignore[no-untyped-def]
    """A token's rotated key, to its place in the cache."""
    num_kv_heads, head_dim = keys.shape[1], head.size
    flat, begin = keys.reshape(-1), (slot // BLOCK * num_kv_heads + kv_head) * head_dim * BLOCK
    offset = slot % BLOCK
    if paired:
        for d in range(head_dim):
            flat[begin + d // 2 * 2 * BLOCK + 2 * offset + d % 2] = narrow(head[d], keys)
    else:
        for d in range(head_dim):
            flat[begin + d * BLOCK + offset] = narrow(head[d], keys)


@njit(**INNER)
def _keep_value(head, slot, kv_head, paired, values):  # type: ignore[no-untyped-def]
    """Its value."""
    num_kv_heads, head_dim = values.shape[1], head.size
    flat, begin = values.reshape(-1), (slot // BLOCK * num_kv_heads + kv_head) * head_dim * BLOCK
    offset = slot % BLOCK
    if paired:
        line = begin + offset // 2 * 2 * head_dim + offset % 2
        for d in range(head_dim):
            flat[line + 2 * d] = narrow(head[d], values)
    else:
        line = begin + offset * head_dim
        for d in range(head_dim):
            flat[line + d] = narrow(head[d], values)


@njit(**OPTIONS)
def rotate_and_cache(share, shares, qkv, cos, sin, q_norm, k_norm, eps, scale, slots, paired, queries, keys, values):  # type: ignore[no-untyped-def]
    """Split a fused projection: queries rotated and scaled, keys and values rotated into the cache.

    Args:
        share, shares: Which heads of the rows, see `team`.
        qkv: [rows, (num_heads + 2 * num_kv_heads) * head_dim], float32 or bfloat16 bits.
        cos, sin: float32 [rows, head_dim / 2], or [rows, 0] for layers without rotation.
        q_norm, k_norm: float32 [head_dim], or [0] for none.
        eps: Of those norms, float32.
        scale: Multiplied into the queries, float32 (1 / sqrt(head_dim)).
        slots: int64 [rows], block * 16 + offset where the row's key and value go.
        paired: The cache has the layout of `attention_tiles`.
        queries: Out, float32 [rows, num_heads, head_dim].
        keys, values: Out, one layer's cache.
    """
    rows, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    heads, head = num_heads + num_kv_heads, np.empty(head_dim, np.float32)
    for task in range(rows * heads * share // shares, rows * heads * (share + 1) // shares):
        row, h = task // heads, task % heads
        kv_head, source = h - num_heads, qkv[row]
        _copy_head(source, h * head_dim, head)
        _normalise(head, q_norm if kv_head < 0 else k_norm, eps)
        _rotate(head, cos[row], sin[row])
        if kv_head < 0:
            for d in range(head_dim):
                queries[row, h, d] = head[d] * scale
        else:
            _keep_key(head, slots[row], kv_head, paired, keys)
            _copy_head(source, (heads + kv_head) * head_dim, head)
            _keep_value(head, slots[row], kv_head, paired, values)


@njit(**INNER)
def _softmax(scores, at, span, first, end):  # type: ignore[no-untyped-def]
    """Softmax numerators of scores[at + first : at + end] in place, zeros elsewhere in the span; returns their sum."""
    line = scores[at : at + span]
    line[:first] = -np.inf
    line[end:] = -np.inf
    top = vector_max(scores, at, span)
    for t in range(span):  # all of them: whole vectors are faster than parts
        line[t] = exp(line[t] - top)
    line[:first] = 0
    line[end:] = 0
    return vector_sum(scores, at, span)


@njit(**INNER)
def dealt(nth, tasks):  # type: ignore[no-untyped-def]
    """The nth task to take. Later rows of a prompt see more: from both ends, each thread gets short ones, too."""
    return nth // 2 if nth % 2 == 0 else tasks - 1 - nth // 2


@njit(**INNER)
def _heads_together(heads):  # type: ignore[no-untyped-def]
    """How many of so many heads share what is read: as many as registers allow, in turns that are about even."""
    turns = (heads + HEADS - 1) // HEADS
    return (heads + turns - 1) // turns


@njit(**INNER)
def _fetch_block(cache, blocks, index, kv_head, num_kv_heads, size):  # type: ignore[no-untyped-def]
    """Fetch one head's part of a block, which will be read soon. Blocks lie anywhere: no processor guesses the next."""
    if index < blocks.size:
        fetch(cache, (blocks[index] * num_kv_heads + kv_head) * size, size)


@njit(**INNER)
def _attend(queries, keys, values, table, position, window, row, kv_head, top, bottom, cached, out):  # type: ignore[no-untyped-def]
    """Attention of one row's query heads from top to bottom of those that share a key-value head.

    What is not `cached`, because the row before has read it, is fetched some blocks ahead.
    """
    num_heads, head_dim = queries.shape[1:]
    num_kv_heads, heads = keys.shape[1], bottom - top
    group, size, step = num_heads // num_kv_heads, head_dim * BLOCK, _heads_together(heads)
    flat_queries, flat_keys, flat_values = queries.reshape(-1), keys.reshape(-1), values.reshape(-1)
    head = row * num_heads + kv_head * group + top
    first = max(0, position + 1 - window) if window > 0 else 0
    first_block, last_block = first // BLOCK, position // BLOCK
    span = (last_block - first_block + 1) * BLOCK
    skipped, count = first - first_block * BLOCK, position + 1 - first_block * BLOCK
    blocks = table[first_block : last_block + 1]
    ahead, started = (blocks.size, 0) if cached else (AHEAD, AHEAD)
    for b in range(started):
        _fetch_block(flat_keys, blocks, b, kv_head, num_kv_heads, size)
    scores = np.empty(heads * span, np.float32)
    for b in range(blocks.size):
        _fetch_block(flat_keys, blocks, b + ahead, kv_head, num_kv_heads, size)
        keys_at = (blocks[b] * num_kv_heads + kv_head) * size
        for h in range(0, heads, step):
            some, query_at, at = min(step, heads - h), (head + h) * head_dim, h * span + b * BLOCK
            transposed_dots16(some, scores, at, span, flat_queries, query_at, flat_keys, keys_at, head_dim)
    for b in range(started):
        _fetch_block(flat_values, blocks, b, kv_head, num_kv_heads, size)
    totals = np.zeros(heads * head_dim, np.float32)
    inverse = np.empty(heads, np.float32)
    for h in range(heads):
        inverse[h] = np.float32(1) / _softmax(scores, h * span, span, skipped, count)
    for b in range(blocks.size):
        _fetch_block(flat_values, blocks, b + ahead, kv_head, num_kv_heads, size)
        values_at = (blocks[b] * num_kv_heads + kv_head) * size
        # Slots after the row's own position may hold anything, so they are left out, not multiplied by zero.
        used = min(BLOCK, count - b * BLOCK)
        for h in range(0, heads, step):
            some, scores_at = min(step, heads - h), h * span + b * BLOCK
            for d in range(0, head_dim, LANES):
                at, rows_at = h * head_dim + d, values_at + d
                weighted_rows16(
                    some, totals, at, head_dim, scores, scores_at, span, flat_values, rows_at, head_dim, used
                )
    for h in range(heads):
        at = (kv_head * group + top + h) * head_dim
        for d in range(head_dim):
            out[row, at + d] = narrow(totals[h * head_dim + d] * inverse[h], out)


@njit(**OPTIONS)
def paged_attention(share, shares, queries, keys, values, block_tables, row_sequence, positions, window, out):  # type: ignore[no-untyped-def]
    """Causal attention of token rows over their sequences' cached keys and values (their own included).

    Args:
        share, shares: Which query heads, see `team`. A row may have fewer key-value heads than there are threads.
        queries: float32 [rows, num_heads, head_dim], rotated and scaled; head_dim a multiple of 16.
        keys, values: One layer's cache in the layout above, float32 or bfloat16 bits.
        block_tables: int32 [sequences, blocks], cache blocks of each sequence in order.
        row_sequence: int32 [rows], the row's line in `block_tables`.
        positions: int64 [rows], position of the row's token.
        window: Attend to this many most recent positions, itself included; 0 for all.
        out: float32 or bfloat16 bits [rows, num_heads * head_dim].

    Reads 2 * head_dim * (position + 1) cache elements for each row and key-value head, twice where it is shared.
    """
    rows, num_heads = queries.shape[:2]
    num_kv_heads = keys.shape[1]
    group, tasks = num_heads // num_kv_heads, rows * num_kv_heads
    unit, end = tasks * group * share // shares, tasks * group * (share + 1) // shares
    while unit < end:
        task, top = dealt(unit // group, tasks), unit % group
        bottom = min(group, top + end - unit)
        row, kv_head = task // num_kv_heads, task % num_kv_heads
        sequence = row_sequence[row]
        cached = row > 0 and row_sequence[row - 1] == sequence
        table, position = block_tables[sequence], positions[row]
        _attend(queries, keys, values, table, position, window, row, kv_head, top, bottom, cached, out)
        unit += bottom - top
