"""RMSNorm of the residual stream, and the embedding that begins it.

A block's result comes to the residual stream in float32: with many rows the product that ends the block adds it, with
few rows the norm that follows adds the sums of the product's splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.arithmetic import rounded
from engine.kernels.triton.linear import DTYPES, check, ordered_sum
from engine.kernels.triton.overlap import OVERLAPPED, await_inputs

_ELEMENTS_PER_WARP = 256


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor, addend: Tensor | None = None) -> None:
    """out[row] = x[row] / sqrt(mean(x[row]^2) + eps) * weight, in float32, then rounded.

    One program a row: the squares are added by one tree over the whole row, whose shape follows from `hidden` alone.
    Reads the row and the weight once.

    Args:
        x: float32 [rows, hidden], contiguous.
        weight: [hidden], bfloat16 or float32.
        eps: Added to the mean.
        out: [rows, hidden] in the type of `weight`, contiguous, overwritten.
        addend: float32 [splits, rows, hidden], contiguous: its splits are added up in order, and then to `x`, which is
            written, before the norm. None adds nothing.

    Raises:
        ValueError: A shape, type or layout is not as above.
    """
    rows, hidden = x.shape
    check("x", x, (rows, hidden), (torch.float32,))
    check("weight", weight, (hidden,), DTYPES)
    check("out", out, (rows, hidden), (weight.dtype,))
    splits = 0 if addend is None else len(addend)
    if addend is not None:
        check("addend", addend, (splits, rows, hidden), (torch.float32,))
    if rows:
        block = triton.next_power_of_2(hidden)
        _rms_norm[(rows,)](
            x,
            weight,
            addend,
            out,
            eps,
            rows,
            HIDDEN=hidden,
            BLOCK=block,
            SPLITS=splits,
            num_warps=_warps(block),
            **OVERLAPPED,
        )


def embed(token_ids: Tensor, embedding: Tensor, *, out: Tensor) -> None:
    """out[row] = embedding[token_ids[row]], widened to float32.

    Args:
        token_ids: int64 [rows], each in [0, vocab).
        embedding: [vocab, hidden], contiguous, bfloat16 or float32.
        out: float32 [rows, hidden], contiguous, overwritten.

    Raises:
        ValueError: A shape, type or layout is not as above.
    """
    (rows,), (vocab, hidden) = token_ids.shape, embedding.shape
    check("token_ids", token_ids, (rows,), (torch.int64,))
    check("embedding", embedding, (vocab, hidden), DTYPES)
    check("out", out, (rows, hidden), (torch.float32,))
    if rows:
        block = triton.next_power_of_2(hidden)
        _embed[(rows,)](token_ids, embedding, out, HIDDEN=hidden, BLOCK=block, num_warps=_warps(block), **OVERLAPPED)


def _warps(block: int) -> int:
    return max(1, min(16, block // _ELEMENTS_PER_WARP))


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(x, weight, addend, out, eps, rows, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program r: row r."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    start = row * HIDDEN
    column = tl.arange(0, BLOCK)
    mask = column < HIDDEN
    values = tl.load(x + start + column, mask=mask, other=0.0)
    if SPLITS > 0:
        values += ordered_sum(addend, rows, HIDDEN, row, column, mask, SPLITS)
        tl.store(x + start + column, values, mask=mask)
    scale = tl.rsqrt(tl.sum(values * values, 0) / HIDDEN + eps)
    normed = values * scale * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + start + column, rounded(normed, out.dtype.element_ty), mask=mask)


@triton.jit
def _embed(token_ids, embedding, out, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program r: row r."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < HIDDEN
    values = tl.load(embedding + tl.load(token_ids + row) * HIDDEN + column, mask=mask)
    tl.store(out + row * HIDDEN + column, values.to(tl.float32), mask=mask)
