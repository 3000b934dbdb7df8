"""From one row of queries, keys and values to rotated queries and a written cache."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.backend import rotary_angles
from engine.kernels.triton.arithmetic import rounded
from engine.kernels.triton.linear import DTYPES, check, ordered_sum
from engine.kernels.triton.overlap import OVERLAPPED, await_inputs
from engine.kv_cache import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Cosines and sines of all positions, made on the CPU, so that every device turns by the same angles.

    Attributes:
        cos: float32 [positions, head_dim / 2].
        sin: Likewise.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def make(cls, inv_freq: Tensor, positions: int, device: torch.device) -> "RotaryTable":
        """For positions 0 to `positions` - 1.

        Args:
            inv_freq: float32 [head_dim / 2].
            positions: How many.
            device: Where the table is wanted.
        """
        cos, sin = rotary_angles(torch.arange(positions), inv_freq.cpu())
        return cls(cos.to(device), sin.to(device))


def rotate_and_cache(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    table: RotaryTable | None,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Norm each head of queries and keys (Qwen3), rotate them by halves, write keys and values to their cache slots.

    In float32 from the product to the one rounding at the end. Reads `qkv` once.

    Args:
        qkv: float32 [splits, rows, (num_heads + 2 * num_kv_heads) * head_dim], contiguous: the sum of its splits in
            order; biases are in there already.
        positions: int64 [rows].
        slots: int64 [rows], block * BLOCK_SIZE + offset; a negative one writes nothing.
        q_norm: [head_dim], or none.
        k_norm: [head_dim], or none.
        eps: Of the norms.
        table: Angles; None leaves queries and keys unrotated.
        q: [rows, num_heads, head_dim], contiguous, in the cache's type, overwritten.
        keys: One layer's [blocks, num_kv_heads, head_dim, BLOCK_SIZE], contiguous.
        values: One layer's [blocks, num_kv_heads, BLOCK_SIZE, head_dim], contiguous.

    Raises:
        ValueError: A shape, type or layout is not as above.
    """
    rows, num_heads, head_dim = q.shape
    num_blocks, num_kv_heads, _, _ = keys.shape
    splits = len(qkv)
    check("qkv", qkv, (splits, rows, (num_heads + 2 * num_kv_heads) * head_dim), (torch.float32,))
    check("positions", positions, (rows,), (torch.int64,))
    check("slots", slots, (rows,), (torch.int64,))
    check("keys", keys, (num_blocks, num_kv_heads, head_dim, BLOCK_SIZE), DTYPES)
    check("values", values, (num_blocks, num_kv_heads, BLOCK_SIZE, head_dim), (keys.dtype,))
    check("q", q, (rows, num_heads, head_dim), (keys.dtype,))
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check(name, norm, (head_dim,), DTYPES)
    if rows == 0:
        return
    _rotate_and_cache[(rows, num_heads + 2 * num_kv_heads)](
        qkv,
        positions,
        slots,
        q_norm,
        k_norm,
        None if table is None else table.cos,
        None if table is None else table.sin,
        q,
        keys,
        values,
        eps,
        rows,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        BLOCK_SIZE=BLOCK_SIZE,
        SPLITS=splits,
        HAS_NORM=q_norm is not None,
        ROTATED=table is not None,
        num_warps=1,
        **OVERLAPPED,
    )


@triton.jit
def _rotated(  # type: ignore[no-untyped-def]
    first,
    second,
    norm,
    cos,
    sin,
    position,
    eps,
    pair,
    in_half,
    HEAD_DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Both halves of a head, float32 [half], normed and rotated."""
    half: tl.constexpr = HEAD_DIM // 2
    if HAS_NORM:
        squares = tl.sum(first * first, 0) + tl.sum(second * second, 0)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)
        first = first * scale * tl.load(norm + pair, mask=in_half, other=0.0).to(tl.float32)
        second = second * scale * tl.load(norm + half + pair, mask=in_half, other=0.0).to(tl.float32)
    if ROTATED:
        c = tl.load(cos + position * half + pair, mask=in_half, other=0.0)
        s = tl.load(sin + position * half + pair, mask=in_half, other=0.0)
        first, second = first * c - second * s, second * c + first * s
    return first, second


@triton.jit(do_not_specialize=["rows"])
def _rotate_and_cache(  # type: ignore[no-untyped-def]
    qkv,
    positions,
    slots,
    q_norm,
    k_norm,
    cos,
    sin,
    q,
    keys,
    values,
    eps,
    rows,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Program (r, i): of row r the i-th head; queries come first, then keys, then values."""
    await_inputs()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    width: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    half: tl.constexpr = HEAD_DIM // 2
    pair = tl.arange(0, BLOCK_HALF)
    in_half = pair < half
    at = head * HEAD_DIM + pair
    position = tl.load(positions + row)
    if head < NUM_HEADS:
        first = ordered_sum(qkv, rows, width, row, at, in_half, SPLITS)
        second = ordered_sum(qkv, rows, width, row, at + half, in_half, SPLITS)
        first, second = _rotated(
            first, second, q_norm, cos, sin, position, eps, pair, in_half, HEAD_DIM, HAS_NORM, ROTATED
        )
        target = q + row * (NUM_HEADS * HEAD_DIM) + at
        tl.store(target, rounded(first, q.dtype.element_ty), mask=in_half)
        tl.store(target + half, rounded(second, q.dtype.element_ty), mask=in_half)
    else:
        slot = tl.load(slots + row)
        if slot >= 0:
            first = ordered_sum(qkv, rows, width, row, at, in_half, SPLITS)
            second = ordered_sum(qkv, rows, width, row, at + half, in_half, SPLITS)
            kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
            block_head = (slot // BLOCK_SIZE * NUM_KV_HEADS + kv_head) * (HEAD_DIM * BLOCK_SIZE)
            if head < NUM_HEADS + NUM_KV_HEADS:
                first, second = _rotated(
                    first, second, k_norm, cos, sin, position, eps, pair, in_half, HEAD_DIM, HAS_NORM, ROTATED
                )
                target = keys + block_head + pair * BLOCK_SIZE + slot % BLOCK_SIZE
                tl.store(target, rounded(first, keys.dtype.element_ty), mask=in_half)
                tl.store(target + half * BLOCK_SIZE, rounded(second, keys.dtype.element_ty), mask=in_half)
            else:
                target = values + block_head + slot % BLOCK_SIZE * HEAD_DIM + pair
                tl.store(target, rounded(first, values.dtype.element_ty), mask=in_half)
                tl.store(target + half, rounded(second, values.dtype.element_ty), mask=in_half)
