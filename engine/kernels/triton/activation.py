"""The activation of a step's gate values, each row in its own mode, and the list of neurons that are not 0 then.

One launch serves SILU, stochastic and RELU rows together. Masks are those of `engine.activation.apply_activation` bit
for bit; values differ from it by a few units of float32.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.activation import ALWAYS_SILU, MODE_CODE, ActivationMode, ActivationRows, PositiveBranch
from engine.kernels.triton.linear import check, ordered_sum
from engine.kernels.triton.overlap import OVERLAPPED, await_inputs
from engine.kernels.triton.philox import random_words
from engine.kernels.triton.tuning import ROW_TILE
from engine.kernels.triton.workspace import Part
from engine.philox import STREAM_ACTIVATION

NEURONS = 128  # of a program; their active ones are listed together

_SILU = tl.constexpr(MODE_CODE[ActivationMode.SILU])
_ALWAYS = tl.constexpr(ALWAYS_SILU)
_STREAM = tl.constexpr(STREAM_ACTIVATION)


@dataclass(frozen=True, slots=True)
class ActiveNeurons:
    """Neurons whose activation is not 0 in some row of a tile of `ROW_TILE` rows; all on the device.

    Attributes:
        flags: uint8 [row tiles, intermediate], 1 for active ones.
        neurons: int32 [row tiles, blocks * NEURONS]: of each block of `NEURONS` its active neurons in rising order,
            from the block's beginning on; the rest of the block is garbage.
        counts: int32 [row tiles, blocks], active neurons of each block.
    """

    flags: Tensor
    neurons: Tensor
    counts: Tensor

    @staticmethod
    def parts(rows: int, intermediate: int) -> list[Part]:
        """What to carve out of a workspace."""
        tiles, blocks = triton.cdiv(rows, ROW_TILE), triton.cdiv(intermediate, NEURONS)
        return [
            ((tiles, intermediate), torch.uint8),
            ((tiles, blocks * NEURONS), torch.int32),
            ((tiles, blocks), torch.int32),
        ]


@triton.jit
def silu(x):  # type: ignore[no-untyped-def]
    """x * sigmoid(x), float32, never a NaN for finite x; for kernels."""
    small = tl.exp(-tl.abs(x))
    return x * (tl.where(x < 0, small, 1.0) / (1.0 + small))


@triton.jit(do_not_specialize=["rows", "layer"])
def _activate_kernel(  # type: ignore[no-untyped-def]
    sums,
    modes,
    thresholds,
    keys,
    positions,
    activated,
    zero_counts,
    flags,
    neurons,
    counts,
    layer,
    rows,
    size,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    IDENTITY: tl.constexpr,
    LIST: tl.constexpr,
):
    """Program (t, b): rows of tile t, neurons of block b. Elements are independent, sums of splits are in order.

    Reads SPLITS float32 for each element and writes one; draws only where a row of the tile is stochastic.
    """
    await_inputs()
    tile, block = tl.program_id(0), tl.program_id(1)
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    neuron = block * BLOCK + tl.arange(0, BLOCK)
    row_mask, neuron_mask = row < rows, neuron < size
    mask = row_mask[:, None] & neuron_mask[None, :]
    x = ordered_sum(sums, rows, size, row[:, None], neuron[None, :], mask, SPLITS)

    threshold = tl.load(thresholds + row, mask=row_mask, other=0)
    words = tl.zeros((ROWS, BLOCK), tl.uint32)  # below a threshold of 2**32, and not below one of 0
    drawing = (threshold > 0) & (threshold < _ALWAYS)
    if tl.max(drawing.to(tl.int32), 0) > 0:
        key_0 = tl.load(keys + 2 * row, mask=row_mask, other=0)
        key_1 = tl.load(keys + 2 * row + 1, mask=row_mask, other=0)
        position = tl.load(positions + row, mask=row_mask, other=0)
        words = random_words(key_0, key_1, position, layer, block * BLOCK, _STREAM, BLOCK)

    through = silu(x)
    negative = tl.where(words.to(tl.int64) < threshold[:, None], through, 0.0)
    if IDENTITY:
        is_silu = tl.load(modes + row, mask=row_mask, other=0) == _SILU
        positive = tl.where(is_silu[:, None], through, x)
    else:
        positive = through
    value = tl.where(x < 0, negative, positive)
    tl.store(activated + row[:, None] * size + neuron[None, :], value, mask=mask)
    zeros = tl.sum((mask & (value == 0)).to(tl.int32), 1)
    tl.store(zero_counts + block * rows + row, zeros, mask=row_mask)

    if LIST:
        # A NaN differs from 0, so it is active and reaches its row's result.
        active = tl.max((mask & (value != 0)).to(tl.int32), 0)
        tl.store(flags + tile.to(tl.int64) * size + neuron, active.to(tl.uint8), mask=neuron_mask)
        blocks = tl.num_programs(1)
        place = tl.cumsum(active, 0) - active
        tl.store(neurons + (tile * blocks + block).to(tl.int64) * BLOCK + place, neuron, mask=active > 0)
        tl.store(counts + tile * blocks + block, tl.sum(active, 0))


def zero_counts_part(rows: int, intermediate: int) -> Part:
    """What to carve out of a workspace for the zeros of each block."""
    return (triton.cdiv(intermediate, NEURONS), rows), torch.int32


def activate(
    sums: Tensor,
    rows: ActivationRows,
    layer: int,
    *,
    out: Tensor,
    zero_counts: Tensor,
    active: ActiveNeurons | None = None,
) -> None:
    """Activation of gate values, and how many are 0.

    Args:
        sums: float32 [splits, rows, intermediate], contiguous: gate values are their sums over the splits, in order.
        rows: The rows' activations, on the same device.
        layer: Decoder layer, part of the random counter.
        out: float32 [rows, intermediate], written.
        zero_counts: int32 [blocks, rows], written: values that are exactly 0 of each block of `NEURONS` neurons.
        active: Written if given: the neurons that are not 0 in every row of a tile.

    Raises:
        ValueError: A shape, type or layout is not as above.
    """
    splits, count, size = sums.shape
    blocks = triton.cdiv(size, NEURONS)
    check("sums", sums, (splits, count, size), (torch.float32,))
    check("rows.mode", rows.mode, (count,), (torch.int64,))
    check("rows.threshold", rows.threshold, (count,), (torch.int64,))
    check("rows.keys", rows.keys, (count, 2), (torch.int64,))
    check("rows.positions", rows.positions, (count,), (torch.int64,))
    check("out", out, (count, size), (torch.float32,))
    check("zero_counts", zero_counts, (blocks, count), (torch.int32,))
    if count == 0:
        return
    _activate_kernel[(triton.cdiv(count, ROW_TILE), blocks)](
        sums,
        rows.mode,
        rows.threshold,
        rows.keys,
        rows.positions,
        out,
        zero_counts,
        None if active is None else active.flags,
        None if active is None else active.neurons,
        None if active is None else active.counts,
        layer,
        count,
        size,
        SPLITS=splits,
        ROWS=min(triton.next_power_of_2(count), ROW_TILE),
        BLOCK=NEURONS,
        IDENTITY=rows.positive_branch is PositiveBranch.IDENTITY,
        LIST=active is not None,
        num_warps=4 if count <= ROW_TILE // 4 else 8,
        **OVERLAPPED,
    )
