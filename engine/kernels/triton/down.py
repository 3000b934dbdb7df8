"""The down projection from neuron-major weights [intermediate, hidden], with or without the rows of idle neurons.

The neurons are cut into splits as the inputs of `linear` are, with the same two schedules. Without idle neurons the
same tiles of neurons are multiplied in the same order, and only the loads of idle neurons' weights are left out:
zeros stand in for them. The hidden values they meet are 0, so either way each product is 0, and adding it changes no
bit of a sum: a sum that begins with +0 never becomes -0.
"""

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.arithmetic import multiply_add
from engine.kernels.triton.linear import finish
from engine.kernels.triton.overlap import OVERLAPPED, await_inputs
from engine.kernels.triton.tuning import ROW_TILE, Tile


@triton.jit
def neuron_sum(  # type: ignore[no-untyped-def]
    h,
    weight,
    flags,
    row,
    row_mask,
    column,
    column_mask,
    start,
    stop,
    size,
    width,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SKIP: tl.constexpr,
):
    """Sum over neurons [start, stop) of h[row, neuron] * weight[neuron, column], float32 [M, N]; for kernels.

    As `linear.split_sum` for a weight [neurons, outputs]. With SKIP, weights are read only of neurons with a flag.
    """
    total = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for first in range(start, stop, BLOCK_K):
        neuron = first + tl.arange(0, BLOCK_K)
        exists = neuron < stop
        wanted = row_mask[:, None]
        if not EVEN_K:
            wanted = wanted & exists[None, :]
        needed = column_mask[None, :]
        if SKIP:
            needed = needed & (tl.load(flags + neuron, mask=exists, other=0) != 0)[:, None]
        elif not EVEN_K:
            needed = needed & exists[:, None]
        a = tl.load(h + row[:, None] * size + neuron[None, :], mask=wanted, other=0.0)
        b = tl.load(weight + neuron.to(tl.int64)[:, None] * width + column[None, :], mask=needed, other=0.0)
        total = multiply_add(a, b, total)
    return total


@triton.jit(do_not_specialize=["rows"])
def _down_kernel(  # type: ignore[no-untyped-def]
    h,
    weight,
    flags,
    out,
    rows,
    size,
    width,
    split_size,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    WHOLE: tl.constexpr,
    SKIP: tl.constexpr,
):
    """Out += h @ weight, or the sum of one split of it.

    Program (i, s): tile i, row tiles first. WHOLE: all splits in order, added to `out` [rows, width]; else split s to
    `out` [splits, rows, width].

    Reads, for every row tile, each weight once, or with SKIP BLOCK_N contiguous weights at a time of active neurons.
    """
    await_inputs()
    row_tiles = tl.cdiv(rows, BLOCK_M)
    tile = tl.program_id(0) % row_tiles
    row = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = tl.program_id(0) // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = row < rows, column < width
    mask = row_mask[:, None] & column_mask[None, :]
    if SKIP:
        flags += tile.to(tl.int64) * size
    if WHOLE:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for split in range(splits):
            start = split * split_size
            stop = tl.minimum(start + split_size, size)
            total += neuron_sum(
                h, weight, flags, row, row_mask, column, column_mask, start, stop, size, width, BLOCK_K, EVEN_K, SKIP
            )
        finish(total, out, out, row[:, None], column[None, :], mask, width, False, True)
    else:
        split = tl.program_id(1)
        start = split * split_size
        stop = tl.minimum(start + split_size, size)
        total = neuron_sum(
            h, weight, flags, row, row_mask, column, column_mask, start, stop, size, width, BLOCK_K, EVEN_K, SKIP
        )
        tl.store(out + (split * rows + row[:, None]) * width + column[None, :], total, mask=mask)


def launch_down(h: Tensor, weight: Tensor, tile: Tile, flags: Tensor | None, out: Tensor, *, whole: bool) -> None:
    """Start `_down_kernel`; checks nothing.

    Args:
        h: [rows, intermediate] of the weight's type.
        weight: [intermediate, hidden].
        tile: Of the weight, `Layout.IN_OUT`; with flags its skipping one.
        flags: uint8 [row tiles, intermediate], active neurons; None to read all weights.
        out: float32, added to [rows, hidden] if `whole`, else written [splits, rows, hidden].
        whole: All splits in one program.
    """
    rows, (size, width) = len(h), weight.shape
    splits = tile.split_count(size)
    tiles = triton.cdiv(rows, ROW_TILE) * triton.cdiv(width, tile.block_n)
    _down_kernel[(tiles, 1 if whole else splits)](
        h,
        weight,
        flags,
        out,
        rows,
        size,
        width,
        tile.split_size(size),
        splits,
        WHOLE=whole,
        SKIP=flags is not None,
        **tile.launch_options(size, rows),
        **OVERLAPPED,
    )
