"""The up projection of active neurons only, and its product with the activated gate.

A neuron's value does not depend on its place in a tile, so active neurons are taken from a list, in whatever tile
they land, and get the bits that `linear` gives them among all the others.
"""

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.activation import NEURONS, ActiveNeurons
from engine.kernels.triton.arithmetic import rounded
from engine.kernels.triton.linear import ordered_sum, split_sum
from engine.kernels.triton.overlap import OVERLAPPED, await_inputs
from engine.kernels.triton.tuning import ROW_TILE, Tile, multiprocessors

WAVES = 4  # programs for each multiprocessor; each takes tiles of active neurons until none is left
COUNTS = 32  # of blocks that are looked through at once; more would take registers that the product needs
MULTIPLIED = 256  # neurons of one row, by one program of `_multiply_kernel`


@triton.jit
def total_count(counts, blocks, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of int32 [blocks]; for kernels."""
    at = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, blocks, CHUNK):
        total += tl.load(counts + first + at, mask=first + at < blocks, other=0)
    return tl.sum(total, 0)


@triton.jit
def listed(neurons, counts, blocks, rank, mask, BLOCK: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The active neurons of these ranks, int32 [N]; for kernels.

    Args:
        neurons: Pointer to [blocks * BLOCK], see `ActiveNeurons`.
        counts: Pointer to [blocks].
        rank: int32 [N], counted over all blocks.
        mask: [N], ranks that exist; others get 0.
    """
    at = tl.arange(0, CHUNK)
    block = tl.zeros_like(rank)  # blocks that end at or before a rank, and how many neurons these have
    before = tl.zeros_like(rank)
    running = 0
    for first in range(0, blocks, CHUNK):
        count = tl.load(counts + first + at, mask=first + at < blocks, other=0)
        end = running + tl.cumsum(count, 0)
        passed = end[None, :] <= rank[:, None]
        block += tl.sum(passed.to(tl.int32), 1)
        before = tl.maximum(before, tl.max(tl.where(passed, end[None, :], 0), 1))
        running += tl.sum(count, 0)
    return tl.load(neurons + block * BLOCK + rank - before, mask=mask, other=0)


@triton.jit(do_not_specialize=["rows"])
def _gathered_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    neurons,
    counts,
    out,
    rows,
    size,
    width,
    split_size,
    splits,
    blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    WHOLE: tl.constexpr,
    NEURONS: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """Out[.., row, neuron] = x @ weight.T for the active neurons of a row tile; the rest of `out` is left as it is.

    Program (p, t): row tile t, every p-th tile of active neurons (and split of it). The additions are those of
    `linear._product_kernel`, with WHOLE to `out` [1, rows, width], else to [splits, rows, width].

    Reads `size` weights for each active neuron, as contiguous rows.
    """
    await_inputs()
    tile = tl.program_id(1)
    neurons += tile.to(tl.int64) * blocks * NEURONS
    counts += tile * blocks
    row = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    row_mask = row < rows
    count = total_count(counts, blocks, 4 * COUNTS)
    parts = 1 if WHOLE else splits
    for item in range(tl.program_id(0), tl.cdiv(count, BLOCK_N) * parts, tl.num_programs(0)):
        rank = item // parts * BLOCK_N + tl.arange(0, BLOCK_N)
        exists = rank < count
        neuron = listed(neurons, counts, blocks, rank, exists, NEURONS, COUNTS).to(tl.int64)
        if WHOLE:
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for split in range(splits):
                start = split * split_size
                stop = tl.minimum(start + split_size, size)
                total += split_sum(x, weight, row, row_mask, neuron, exists, start, stop, size, BLOCK_K, EVEN_K)
            place = row[:, None] * width + neuron[None, :]
        else:
            split = item % parts
            start = split * split_size
            stop = tl.minimum(start + split_size, size)
            total = split_sum(x, weight, row, row_mask, neuron, exists, start, stop, size, BLOCK_K, EVEN_K)
            place = (split * rows + row[:, None]) * width + neuron[None, :]
        tl.store(out + place, total, mask=row_mask[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["rows"])
def _multiply_kernel(  # type: ignore[no-untyped-def]
    activated,
    sums,
    zero_counts,
    hidden,
    zeros,
    rows,
    size,
    blocks,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """hidden = activated * (sums added over the splits), exactly 0 where `activated` is 0; zeros of each row.

    Program (b, row): BLOCK neurons of one row. `sums` is read where `activated` is not 0 only: elsewhere it may be
    garbage, and a 0 must not become a NaN by an infinite factor.
    """
    await_inputs()
    row = tl.program_id(1).to(tl.int64)
    neuron = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = neuron < size
    factor = tl.load(activated + row * size + neuron, mask=mask, other=0.0)
    used = mask & (factor != 0)
    value = tl.where(used, factor * ordered_sum(sums, rows, size, row, neuron, used, SPLITS), 0.0)
    tl.store(hidden + row * size + neuron, rounded(value, hidden.dtype.element_ty), mask=mask)
    if tl.program_id(0) == 0:
        total = tl.zeros((COUNTS,), tl.int32)
        for first in range(0, blocks, COUNTS):
            block = first + tl.arange(0, COUNTS)
            total += tl.load(zero_counts + block * rows + row, mask=block < blocks, other=0)
        tl.store(zeros + row, tl.sum(total, 0).to(zeros.dtype.element_ty))


def launch_gathered(x: Tensor, weight: Tensor, tile: Tile, active: ActiveNeurons, out: Tensor, *, whole: bool) -> None:
    """Start `_gathered_kernel`; checks nothing.

    Args:
        x: [rows, hidden] of the weight's type.
        weight: [intermediate, hidden].
        tile: The weight's skipping one.
        active: Neurons to compute.
        out: float32, [1, rows, intermediate] if `whole`, else [splits, rows, intermediate].
        whole: All splits in one program.
    """
    rows, (width, size) = len(x), weight.shape
    blocks = triton.cdiv(width, NEURONS)
    splits = tile.split_count(size)
    most = triton.cdiv(width, tile.block_n) * (1 if whole else splits)
    _gathered_kernel[(min(most, WAVES * multiprocessors(x.device)), triton.cdiv(rows, ROW_TILE))](
        x,
        weight,
        active.neurons,
        active.counts,
        out,
        rows,
        size,
        width,
        tile.split_size(size),
        splits,
        blocks,
        WHOLE=whole,
        NEURONS=NEURONS,
        COUNTS=COUNTS,
        **tile.launch_options(size, rows),
        **OVERLAPPED,
    )


def launch_multiply(activated: Tensor, sums: Tensor, zero_counts: Tensor, hidden: Tensor, zeros: Tensor) -> None:
    """Start `_multiply_kernel`; checks nothing.

    Args:
        activated: float32 [rows, intermediate].
        sums: float32 [splits, rows, intermediate], of the up projection.
        zero_counts: int32 [blocks, rows].
        hidden: [rows, intermediate], written.
        zeros: Integers [rows], written.
    """
    splits, rows, size = sums.shape
    _multiply_kernel[(triton.cdiv(size, MULTIPLIED), rows)](
        activated,
        sums,
        zero_counts,
        hidden,
        zeros,
        rows,
        size,
        len(zero_counts),
        SPLITS=splits,
        BLOCK=MULTIPLIED,
        COUNTS=COUNTS,
        **OVERLAPPED,
    )
