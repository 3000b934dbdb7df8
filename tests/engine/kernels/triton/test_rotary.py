"""Norms of heads, rotation and the write to the cache, against the reference backend's steps."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.kernels.backend import rotary_angles
from engine.kernels.reference import rotate
from engine.kernels.triton.rotary import RotaryTable, rotate_and_cache
from engine.kv_cache import BLOCK_SIZE
from engine.models.rope import inverse_frequencies
from tests.engine.kernels.kinds import normal
from tests.engine.kernels.triton.devices import DEVICE, ROWS, every_dtype

EPS = 1e-6
HEADS, KV_HEADS, BLOCKS = 3, 2, 5
FREE = 7.0  # what slots hold that nothing is written to


def run(
    qkv: Tensor, positions: Tensor, slots: Tensor, norms: Tensor | None, dtype: torch.dtype, *, rotated: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the kernel, on the CPU."""
    qkv = qkv if qkv.ndim == 3 else qkv[None]
    rows, head_dim = qkv.shape[1], qkv.shape[2] // (HEADS + 2 * KV_HEADS)
    q = torch.empty(rows, HEADS, head_dim, dtype=dtype, device=DEVICE)
    keys = torch.full((BLOCKS, KV_HEADS, head_dim, BLOCK_SIZE), FREE, dtype=dtype, device=DEVICE)
    values = torch.full((BLOCKS, KV_HEADS, BLOCK_SIZE, head_dim), FREE, dtype=dtype, device=DEVICE)
    table = RotaryTable.make(inverse_frequencies(head_dim, 10_000.0), 100, DEVICE) if rotated else None
    rotate_and_cache(
        qkv.to(DEVICE),
        positions.to(DEVICE),
        slots.to(DEVICE),
        q_norm=None if norms is None else norms[0].to(DEVICE),
        k_norm=None if norms is None else norms[1].to(DEVICE),
        eps=EPS,
        table=table,
        q=q,
        keys=keys,
        values=values,
    )
    return q.cpu(), keys.cpu(), values.cpu()


@every_dtype
@pytest.mark.parametrize("rows", ROWS)
def test_equals_the_reference(rows: int, dtype: torch.dtype) -> None:
    check_against_reference(rows, 24, rotated=True, normed=True, dtype=dtype)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("rotated", [False, True], ids=["still", "rotated"])
def test_layers_without_norms_or_rotation(rotated: bool, normed: bool) -> None:
    check_against_reference(2, 16, rotated=rotated, normed=normed, dtype=torch.float32)


def check_against_reference(rows: int, head_dim: int, *, rotated: bool, normed: bool, dtype: torch.dtype) -> None:
    qkv = normal(rows, (HEADS + 2 * KV_HEADS) * head_dim, seed=1)
    norms = normal(2, head_dim, seed=2, dtype=dtype) if normed else None
    positions = torch.arange(rows) * 3 % 100
    slots = torch.randperm(BLOCKS * BLOCK_SIZE, generator=torch.Generator().manual_seed(3))[:rows]

    q, keys, values = run(qkv, positions, slots, norms, dtype, rotated=rotated)

    widths = [HEADS * head_dim, KV_HEADS * head_dim, KV_HEADS * head_dim]
    expected_q, k, v = (part.unflatten(1, (-1, head_dim)) for part in qkv.split(widths, 1))
    if norms is not None:
        expected_q = functional.rms_norm(expected_q, (head_dim,), norms[0].float(), EPS)
        k = functional.rms_norm(k, (head_dim,), norms[1].float(), EPS)
    if rotated:
        angles = rotary_angles(positions, inverse_frequencies(head_dim, 10_000.0))
        expected_q, k = rotate(expected_q, *angles), rotate(k, *angles)
    expected_keys, expected_values = torch.full_like(keys, FREE), torch.full_like(values, FREE)
    expected_keys[slots // BLOCK_SIZE, :, :, slots % BLOCK_SIZE] = k.to(dtype)
    expected_values[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] = v.to(dtype)
    tolerance = 2.0**-7 if dtype is torch.bfloat16 else 2e-6
    torch.testing.assert_close(q, expected_q.to(dtype), rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(keys, expected_keys, rtol=tolerance, atol=1e-6)
    assert torch.equal(values, expected_values)


def test_a_row_without_a_slot_writes_nothing() -> None:
    qkv = normal(2, (HEADS + 2 * KV_HEADS) * 16, seed=1)

    _, keys, values = run(qkv, torch.zeros(2, dtype=torch.int64), torch.tensor([-1, 3]), None, torch.float32)

    assert (keys != FREE).sum() == (values != FREE).sum() == KV_HEADS * 16


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    qkv, norms = normal(9, (HEADS + 2 * KV_HEADS) * 16, seed=1), normal(2, 16, seed=2)
    positions, slots = torch.arange(9) * 5, torch.arange(9) + 20
    together = run(qkv, positions, slots, norms, torch.float32)

    alone = run(qkv[6:7], positions[6:7], slots[6:7], norms, torch.float32)

    assert torch.equal(alone[0][0], together[0][6])
    assert torch.equal(alone[1][1, :, :, 10], together[1][1, :, :, 10])


def test_splits_are_added_in_order() -> None:
    splits = 1e4 * normal(3, 4, (HEADS + 2 * KV_HEADS) * 16, seed=1)
    positions, slots, norms = torch.arange(4) * 5, torch.arange(4) + 20, normal(2, 16, seed=2)

    found = run(splits, positions, slots, norms, torch.float32)

    expected = run((splits[0] + splits[1]) + splits[2], positions, slots, norms, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_angles_are_those_of_the_reference() -> None:
    inv_freq = inverse_frequencies(16, 10_000.0)

    table = RotaryTable.make(inv_freq, 50, DEVICE)

    cos, sin = rotary_angles(torch.arange(50), inv_freq)
    assert torch.equal(table.cos.cpu(), cos)
    assert torch.equal(table.sin.cpu(), sin)
