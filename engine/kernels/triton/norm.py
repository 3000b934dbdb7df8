"""RMSNorm of the residual stream, and the embedding that begins it.

The residual is added by the second stage of the products that end a block (`linear(..., add=True)`), in float32, so a
norm only reads it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton.arithmetic import rounded
from engine.kernels.triton.linear import DTYPES, check

_ELEMENTS_PER_WARP = 512


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor) -> None:
    """out[row] = x[row] / sqrt(mean(x[row]^2) + eps) * weight, in float32, then rounded.

    One program a row: the squares are added by one tree over the whole row, whose shape follows from `hidden` alone.
    Reads the row and the weight once.

    Args:
        x: float32 [rows, hidden], contiguous.
        weight: [hidden], bfloat16 or float32.
        eps: Added to the mean.
        out: [rows, hidden] in the type of `weight`, contiguous, overwritten.

    Raises:
        ValueError: A shape, type or layout is not as above.
    """
    rows, hidden = x.shape
    check("x", x, (rows, hidden), (torch.float32,))
    check("weight", weight, (hidden,), DTYPES)
    check("out", out, (rows, hidden), (weight.dtype,))
    if rows:
        block = triton.next_power_of_2(hidden)
        _rms_norm[(rows,)](x, weight, out, eps, HIDDEN=hidden, BLOCK=block, num_warps=_warps(block))


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
        _embed[(rows,)](token_ids, embedding, out, HIDDEN=hidden, BLOCK=block, num_warps=_warps(block))


def _warps(block: int) -> int:
    return max(1, min(8, block // _ELEMENTS_PER_WARP))


@triton.jit
def _rms_norm(x, weight, out, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program r: row r."""
    start = tl.program_id(0).to(tl.int64) * HIDDEN
    column = tl.arange(0, BLOCK)
    mask = column < HIDDEN
    values = tl.load(x + start + column, mask=mask, other=0.0)
    scale = tl.rsqrt(tl.sum(values * values, 0) / HIDDEN + eps)
    normed = values * scale * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + start + column, rounded(normed, out.dtype.element_ty), mask=mask)


@triton.jit
def _embed(token_ids, embedding, out, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program r: row r."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < HIDDEN
    values = tl.load(embedding + tl.load(token_ids + row) * HIDDEN + column, mask=mask)
    tl.store(out + row * HIDDEN + column, values.to(tl.float32), mask=mask)
