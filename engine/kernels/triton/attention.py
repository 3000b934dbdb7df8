"""Paged attention on the GPU: one kernel for prompts, decoding and steps that mix them.

For a query row at position p, head h, with t over the positions that it sees (t <= p, and t > p - window where there
is a window):

    out[h] = sum_t softmax_t(scale * q[h] . k[t]) v[t]

Layout: q [rows, num_heads, head_dim] and out [rows, num_heads * head_dim] in the type of the cache; one layer's keys
[blocks, num_kv_heads, head_dim, 16] and values [blocks, num_kv_heads, 16, head_dim], as `KVCache` says. Scores, maxima
and sums are float32; numerators are rounded to the type of the cache before they meet the values.

Order of the reduction, which gives every row the same bits in every batch, chunk and schedule:

1. The sequence is cut into splits of `SPLIT` tokens, counted from position 0.
2. Within a split, tiles of `KEY_TILE` tokens, counted from position 0 too, are added by online softmax, first to last.
3. The splits' results (maximum, sum, weighted values) are merged first to last by `_merge`.

A tile or split of which a row sees nothing leaves its sums as they are, to the last bit: the factor of what is there
is 2^0 and what is added is 0 (if an underflow left a -0 there, it becomes +0, which no later sum can tell). So it does
not matter where other rows of a query tile begin or end. What a row sees is a matter of its position alone.

Who computes which split is a matter of speed. With `programs` == 1, a program takes all splits of its rows and merges
them as it goes: prompts and large batches. Else the splits go round `programs` programs, partial results go to a
workspace and a second kernel merges them: few rows, whose long caches then keep the whole device busy. Both ways are
branches of one compiled kernel, so that no compiler can round a split differently in the two.

Bytes read: keys and values of the visible positions once for each query tile and key-value head; in decoding that is
once for each sequence.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.triton.arithmetic import multiply_add, rounded
from engine.kernels.triton.linear import DTYPES, check
from engine.kernels.triton.overlap import OVERLAPPED, await_inputs
from engine.kv_cache import BLOCK_SIZE

QUERY_TILE = 32  # rows of a tile of queries: heads of one group, of one or more tokens
KEY_TILE = 64  # tokens
SPLIT = 128  # tokens, a multiple of KEY_TILE

# Programs that a launch should have at least, if the sequences are long enough: two for each of an H100's 132
# multiprocessors. A matter of speed, not of results.
WANTED_PROGRAMS = 264

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """Which rows of a step attend together: consecutive tokens of one sequence.

    Attributes:
        first: int32 [tiles], first row.
        count: int32 [tiles], rows; 0 is a tile that does nothing.
        programs: Programs that share the splits of one tile.
    """

    first: Tensor
    count: Tensor
    programs: int


class AttentionWorkspace:
    """Memory for the partial results of splits, and how many programs share a tile.

    Args:
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of a head.
        max_tokens: Longest sequence that can come.
        max_rows: Most rows of a step.
        device: Where.
        split: Tokens of a split, a multiple of `KEY_TILE`. Another length rounds differently.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        max_tokens: int,
        max_rows: int,
        device: torch.device,
        split: int = SPLIT,
    ) -> None:
        if split % KEY_TILE:
            raise ValueError(f"split must be a multiple of {KEY_TILE}, got {split}")
        self.num_kv_heads = num_kv_heads
        self.split = split
        self.max_splits = -(-max_tokens // split)
        # With more rows than these, the programs of a launch are enough without sharing.
        rows = min(max_rows, -(-WANTED_PROGRAMS // num_kv_heads)) if self.max_splits > 1 else 0
        self.rows = rows
        self.sums = torch.empty(rows, self.max_splits, num_heads, head_dim, dtype=torch.float32, device=device)
        self.scales = torch.empty(rows, self.max_splits, num_heads, 2, dtype=torch.float32, device=device)

    def programs(self, num_tiles: int, num_rows: int) -> int:
        """Programs that share the splits of a tile in a launch of so many tiles and rows."""
        if num_rows > self.rows:
            return 1
        return max(1, min(self.max_splits, -(-WANTED_PROGRAMS // (num_tiles * self.num_kv_heads))))


def tokens_per_tile(group: int) -> int:
    """Tokens of a sequence that attend together, with `group` query heads to a key-value head."""
    return max(1, QUERY_TILE // group)


def list_tiles(row_sequence: NDArray[np.int32], tokens: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Cut the rows of a step into tiles.

    Args:
        row_sequence: int32 [rows], each row's sequence; rows of a sequence lie together, in order of position.
        tokens: Most rows of a tile.

    Returns:
        First row and number of rows of each tile, int32.
    """
    if len(row_sequence) == 0:
        return np.empty(0, np.int32), np.empty(0, np.int32)
    starts = np.flatnonzero(np.r_[True, row_sequence[1:] != row_sequence[:-1]])
    ends = np.r_[starts[1:], len(row_sequence)]
    parts = [np.arange(start, end, tokens, dtype=np.int32) for start, end in zip(starts, ends, strict=True)]
    first = np.concatenate(parts)
    count = np.minimum(tokens, np.repeat(ends, [len(part) for part in parts]) - first).astype(np.int32)
    return first, count


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    row_sequence: Tensor,
    positions: Tensor,
    tiles: QueryTiles,
    *,
    window: int | None,
    workspace: AttentionWorkspace,
    out: Tensor,
) -> None:
    """Attend to the cache, which holds the rows' own keys and values already.

    Args:
        q: [rows, num_heads, head_dim], contiguous, in the cache's type.
        keys: [blocks, num_kv_heads, head_dim, BLOCK_SIZE], contiguous.
        values: [blocks, num_kv_heads, BLOCK_SIZE, head_dim], contiguous.
        block_tables: int32 [sequences, blocks], last axis contiguous.
        row_sequence: int32 [rows].
        positions: int64 [rows].
        tiles: The rows in tiles; rows of no tile keep what `out` holds.
        window: Most recent positions that a row sees, its own included; None for all.
        workspace: Partial results.
        out: [rows, num_heads * head_dim], contiguous, overwritten.

    Raises:
        ValueError: A shape, type or layout is not as above.
    """
    rows, num_heads, head_dim = q.shape
    num_blocks, num_kv_heads, _, _ = keys.shape
    check("keys", keys, (num_blocks, num_kv_heads, head_dim, BLOCK_SIZE), DTYPES)
    check("values", values, (num_blocks, num_kv_heads, BLOCK_SIZE, head_dim), (keys.dtype,))
    check("q", q, (rows, num_heads, head_dim), (keys.dtype,))
    check("row_sequence", row_sequence, (rows,), (torch.int32,))
    check("positions", positions, (rows,), (torch.int64,))
    check("out", out, (rows, num_heads * head_dim), (keys.dtype,))
    if block_tables.dtype is not torch.int32 or block_tables.stride(-1) != 1:
        raise ValueError("block_tables must be int32 with a contiguous last axis")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads cannot share {num_kv_heads} key-value heads")
    if len(tiles.first) == 0:
        return
    group = num_heads // num_kv_heads
    shared = {
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": triton.next_power_of_2(head_dim),
        "SPLIT": workspace.split,
        "num_warps": 4,
    }
    _attention[(len(tiles.first), num_kv_heads, tiles.programs)](
        q,
        keys,
        values,
        out,
        workspace.sums,
        workspace.scales,
        block_tables,
        row_sequence,
        positions,
        tiles.first,
        tiles.count,
        block_tables.stride(0),
        window or 0,
        tiles.programs,
        workspace.max_splits,
        _LOG2_E / math.sqrt(head_dim),
        GROUP=group,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_SIZE=BLOCK_SIZE,
        QUERY_TILE=max(QUERY_TILE, triton.next_power_of_2(group)),
        KEY_TILE=KEY_TILE,
        **shared,
        **OVERLAPPED,
    )
    if tiles.programs > 1:
        _merge_splits[(rows, num_heads)](
            workspace.sums,
            workspace.scales,
            out,
            positions,
            window or 0,
            workspace.max_splits,
            NUM_HEADS=num_heads,
            **shared,
            **OVERLAPPED,
        )


@triton.jit
def _merge(maximum, total, values, other_maximum, other_total, other_values):  # type: ignore[no-untyped-def]
    """Two partial softmaxes as one: maxima and sums [rows], weighted values [rows, dim].

    Fused multiply-adds are written out, so that every kernel that merges rounds alike.
    """
    largest = tl.maximum(maximum, other_maximum)
    # A row that has seen nothing yet has the maximum -inf; any finite base gives both factors 0.
    base = tl.where(largest == float("-inf"), 0.0, largest)
    own, other = tl.exp2(maximum - base), tl.exp2(other_maximum - base)
    total = tl.fma(total, own, other_total * other)
    own, other = tl.expand_dims(own, 1), tl.expand_dims(other, 1)
    values = tl.fma(values, tl.broadcast_to(own, values.shape), other_values * other)
    return largest, total, values


@triton.jit
def _divided(values, total):  # type: ignore[no-untyped-def]
    """Weighted values [rows, dim] over the sums [rows] of their weights."""
    return tl.div_rn(values, tl.broadcast_to(tl.expand_dims(total, 1), values.shape))


# Not specialised: an argument that is 1 or a multiple of 16 would be compiled into another kernel, and only one and the
# same kernel is sure to round alike.
@triton.jit(do_not_specialize=["table_stride", "window", "programs", "max_splits"])
def _attention(  # type: ignore[no-untyped-def]
    q,
    keys,
    values,
    out,
    sums,
    scales,
    block_tables,
    row_sequence,
    positions,
    tile_first,
    tile_count,
    table_stride,
    window,
    programs,
    max_splits,
    scale,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One query tile and key-value head; splits `program`, `program + programs`, ... of what its rows see.

    Line i of the tile is token i // GROUP, head i % GROUP of the group.
    """
    await_inputs()
    tile, kv_head, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(tile_count + tile)
    if count > 0:
        first = tl.load(tile_first + tile)
        last_position = tl.load(positions + first).to(tl.int32) + count - 1
        table = block_tables + tl.load(row_sequence + first).to(tl.int64) * table_stride

        lines = tl.arange(0, QUERY_TILE)
        token = lines // GROUP
        used = token < count
        position = last_position - count + 1 + token
        lowest = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
        line_row = (first + token).to(tl.int64)
        head = kv_head * GROUP + lines % GROUP
        dims = tl.arange(0, BLOCK_DIM)
        head_base = (line_row * (GROUP * NUM_KV_HEADS) + head) * HEAD_DIM
        in_head = used[:, None] & (dims < HEAD_DIM)[None, :]
        queries = tl.load(q + head_base[:, None] + dims[None, :], mask=in_head, other=0.0)

        first_seen = tl.where(window > 0, tl.maximum(last_position - count + 1 - window + 1, 0), 0)
        first_split = first_seen // SPLIT
        nothing = tl.full((QUERY_TILE, KEY_TILE), 0.0, tl.float32)
        all_maximum = tl.full((QUERY_TILE,), float("-inf"), tl.float32)
        all_total = tl.full((QUERY_TILE,), 0.0, tl.float32)
        all_values = tl.full((QUERY_TILE, BLOCK_DIM), 0.0, tl.float32)
        for split in range(first_split + program, last_position // SPLIT + 1, programs):
            maximum = tl.full((QUERY_TILE,), float("-inf"), tl.float32)
            total = tl.full((QUERY_TILE,), 0.0, tl.float32)
            weighted = tl.full((QUERY_TILE, BLOCK_DIM), 0.0, tl.float32)
            begin = tl.maximum(split * SPLIT, first_seen // KEY_TILE * KEY_TILE)
            end = tl.minimum((split + 1) * SPLIT, last_position + 1)
            for start in range(begin, end, KEY_TILE):
                in_tile = tl.arange(0, KEY_TILE)
                seen = start + in_tile
                written = seen <= last_position
                # `start` is a multiple of the block size. Masks by whole blocks and the hints are what makes loads of
                # keys, whose neighbours are tokens, 16 bytes wide.
                number = start // BLOCK_SIZE + in_tile // BLOCK_SIZE
                begun = number <= last_position // BLOCK_SIZE
                block = tl.load(table + number, mask=begun, other=0).to(tl.int64)
                block_base = (block * NUM_KV_HEADS + kv_head) * (HEAD_DIM * BLOCK_SIZE)
                offset = in_tile % BLOCK_SIZE
                slot = tl.max_contiguous(tl.multiple_of(block_base + offset, BLOCK_SIZE), BLOCK_SIZE)
                key_at = keys + slot[None, :] + dims[:, None] * BLOCK_SIZE
                key_mask = begun[None, :] & (dims < HEAD_DIM)[:, None]
                # Keys that nothing was written to may be anything, NaN too: only scores that are not visible see them.
                key_tile = tl.load(key_at, mask=key_mask, other=0.0)
                scores = multiply_add(queries, key_tile, nothing) * scale
                visible = (seen[None, :] <= position[:, None]) & (seen[None, :] >= lowest[:, None]) & used[:, None]
                scores = tl.where(visible, scores, float("-inf"))
                largest = tl.maximum(maximum, tl.max(scores, 1))
                base = tl.where(largest == float("-inf"), 0.0, largest)
                rescale = tl.exp2(maximum - base)
                numerators = tl.exp2(scores - base[:, None])
                total = tl.fma(total, rescale, tl.sum(numerators, 1))
                value_at = values + (block_base + offset * HEAD_DIM)[:, None] + dims[None, :]
                value_mask = written[:, None] & (dims < HEAD_DIM)[None, :]
                value_tile = tl.load(value_at, mask=value_mask, other=0.0)
                weighted = weighted * rescale[:, None]
                weighted = multiply_add(rounded(numerators, value_tile.dtype), value_tile, weighted)
                maximum = largest
            if programs == 1:
                all_maximum, all_total, all_values = _merge(
                    all_maximum, all_total, all_values, maximum, total, weighted
                )
            else:
                partial = (line_row * max_splits + split) * (GROUP * NUM_KV_HEADS) + head
                tl.store(scales + partial * 2, maximum, mask=used)
                tl.store(scales + partial * 2 + 1, total, mask=used)
                tl.store(sums + partial[:, None] * HEAD_DIM + dims[None, :], weighted, mask=in_head)
        if programs == 1:
            result = _divided(all_values, tl.where(used, all_total, 1.0))
            tl.store(out + head_base[:, None] + dims[None, :], rounded(result, out.dtype.element_ty), mask=in_head)


@triton.jit(do_not_specialize=["window", "max_splits"])
def _merge_splits(  # type: ignore[no-untyped-def]
    sums,
    scales,
    out,
    positions,
    window,
    max_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One row and head: the splits that the row sees, first to last."""
    await_inputs()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + row).to(tl.int32)
    first_seen = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
    dims = tl.arange(0, BLOCK_DIM)
    in_head = (dims < HEAD_DIM)[None, :]
    maximum = tl.full((1,), float("-inf"), tl.float32)
    total = tl.full((1,), 0.0, tl.float32)
    values = tl.full((1, BLOCK_DIM), 0.0, tl.float32)
    for split in range(first_seen // SPLIT, position // SPLIT + 1):
        partial = (row * max_splits + split) * NUM_HEADS + head + tl.arange(0, 1)
        other_maximum, other_total = tl.load(scales + partial * 2), tl.load(scales + partial * 2 + 1)
        other_values = tl.load(sums + partial[:, None] * HEAD_DIM + dims[None, :], mask=in_head, other=0.0)
        maximum, total, values = _merge(maximum, total, values, other_maximum, other_total, other_values)
    result = _divided(values, total)
    at = out + (row * NUM_HEADS + head) * HEAD_DIM + dims[None, :]
    tl.store(at, rounded(result, out.dtype.element_ty), mask=in_head)
