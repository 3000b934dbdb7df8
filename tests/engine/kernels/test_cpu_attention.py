"""Rotary embedding with cache write, and paged attention, against plain PyTorch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.kernels.cpu.attention import paged_attention, rotate_and_cache
from engine.kernels.cpu.attention_tiles import STEP, attention_tiles, list_pieces, tile_attention
from engine.kernels.cpu.formats import as_array
from engine.kernels.cpu.isa import has_amx
from engine.kv_cache import BLOCK_SIZE, blocks_for
from tests.engine.steps import blocks_of

DTYPES = [torch.float32, torch.bfloat16]


@dataclass(frozen=True)
class Attention:
    """A cache of a type, read by vectors or by AMX tiles, which pair what vectors have in a row."""

    dtype: torch.dtype
    tiles: bool

    @property
    def tolerance(self) -> dict[str, float]:
        """Of the result. Tiles round queries and numerators to bfloat16."""
        return {"rtol": 0.02, "atol": 0.02} if self.tiles else {"rtol": 1e-5, "atol": 2e-6}

    def key_slot(self, keys: Tensor, block: int, offset: int) -> Tensor:
        """A view of one token's keys [kv_heads, head_dim] in a cache [blocks, kv_heads, head_dim, 16]."""
        if not self.tiles:
            return keys[block, :, :, offset]
        return keys[block].view(keys.shape[1], -1, BLOCK_SIZE, 2)[:, :, offset]

    def value_slot(self, values: Tensor, block: int, offset: int) -> Tensor:
        """A view of one token's values [kv_heads, head_dim] in a cache [blocks, kv_heads, 16, head_dim]."""
        if not self.tiles:
            return values[block, :, offset]
        return values[block].view(values.shape[1], BLOCK_SIZE // 2, -1, 2)[:, offset // 2, :, offset % 2]


FLOAT32, BFLOAT16 = Attention(torch.float32, tiles=False), Attention(torch.bfloat16, tiles=False)
TILES = Attention(torch.bfloat16, tiles=True)
without_amx = pytest.mark.skipif(
    not has_amx(), reason="this processor has no AMX, or the system does not let it be used"
)
every_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(FLOAT32, id="float32"),
        pytest.param(BFLOAT16, id="bfloat16"),
        pytest.param(TILES, id="amx", marks=without_amx),
    ],
)
POSITIONS = [0, 15, 16, 17, 31, 100]
KV_HEADS = 2


@dataclass
class Problem:
    """Sequences whose last tokens attend; cache slots that none of them has written hold NaN."""

    queries: Tensor  # [rows, num_heads, head_dim], scaled
    lines: list[int]  # each row's sequence
    positions: list[int]  # each row's position
    contexts: list[tuple[Tensor, Tensor]]  # keys and values of each sequence [length, kv_heads, head_dim]
    keys: Tensor
    values: Tensor
    tables: Tensor
    kind: Attention

    @classmethod
    def make(
        cls, rows: Sequence[tuple[int, int]], *, group: int = 2, head_dim: int = 32, kind: Attention = FLOAT32
    ) -> "Problem":
        """Rows are (sequence, position); a sequence is as long as its last row says."""
        generator = torch.Generator().manual_seed(group)
        lengths: dict[int, int] = {}
        for line, position in rows:
            lengths[line] = max(lengths.get(line, 0), position + 1)
        count, width = len(lengths), max(map(blocks_for, lengths.values()))
        keys = torch.full((count * width, KV_HEADS, head_dim, BLOCK_SIZE), torch.nan, dtype=kind.dtype)
        values = torch.full((count * width, KV_HEADS, BLOCK_SIZE, head_dim), torch.nan, dtype=kind.dtype)
        tables = torch.zeros(count, width, dtype=torch.int32)
        contexts = []
        for line in range(count):
            k, v = torch.randn(2, lengths[line], KV_HEADS, head_dim, generator=generator).to(kind.dtype)
            blocks = blocks_of(line, lengths[line], count)
            tables[line, : len(blocks)] = torch.tensor(blocks)
            for position in range(lengths[line]):
                block, offset = blocks[position // BLOCK_SIZE], position % BLOCK_SIZE
                write(kind.key_slot(keys, block, offset), k[position])
                write(kind.value_slot(values, block, offset), v[position])
            contexts.append((k, v))
        queries = torch.randn(len(rows), KV_HEADS * group, head_dim, generator=generator) / math.sqrt(head_dim) * 2
        lines, positions = [line for line, _ in rows], [position for _, position in rows]
        return cls(queries, lines, positions, contexts, keys, values, tables, kind)

    def run(
        self,
        window: int = 0,
        rows: Sequence[int] | None = None,
        out: torch.dtype = torch.float32,
        shares: int = 2,
    ) -> Tensor:
        """The kernel's answer for some of the rows, all by default, cut into so many shares."""
        chosen = list(range(len(self.lines)) if rows is None else rows)
        result = torch.full((len(chosen), self.queries[0].numel()), torch.nan, dtype=out)
        sequence = np.array([self.lines[row] for row in chosen], np.int32)
        positions = np.array([self.positions[row] for row in chosen], np.int64)
        arguments = (
            self.queries[chosen].numpy(),
            as_array(self.keys),
            as_array(self.values),
            self.tables.numpy(),
            sequence,
            positions,
            window,
        )
        if self.kind.tiles:
            pieces = np.empty(len(chosen) + 1, np.int64)
            count = list_pieces(sequence, positions, self.queries.shape[1] // KV_HEADS, pieces)
            for share in range(shares):
                tile_attention(share, shares, *arguments, pieces, count, attention_tiles(), result.numpy())
        else:
            for share in range(shares):
                paged_attention(share, shares, *arguments, as_array(result))
        return result

    def expected(self, window: int = 0) -> Tensor:
        """PyTorch's attention in float64, row by row."""
        return torch.stack([self._expected_row(row, window) for row in range(len(self.lines))])

    def _expected_row(self, row: int, window: int) -> Tensor:
        end = self.positions[row] + 1
        first = max(0, end - window) if window else 0
        k, v = (part[first:end].double().transpose(0, 1)[None] for part in self.contexts[self.lines[row]])
        q = self.queries[row].double()[None, :, None, :]
        return functional.scaled_dot_product_attention(q, k, v, scale=1.0, enable_gqa=True).flatten()


def write(slot: Tensor, token: Tensor) -> None:
    slot[:] = token.view(slot.shape)


ONE_ROW_EACH = list(enumerate(POSITIONS))
PROMPT_AND_DECODE = [*((0, position) for position in range(14, 35)), (1, 100), (2, 0)]


@every_kind
@pytest.mark.parametrize("window", [0, 1, 8, 16, 17, 1000])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 64])
def test_attention_equals_pytorch(group: int, window: int, kind: Attention) -> None:
    problem = Problem.make(ONE_ROW_EACH, group=group, kind=kind)

    torch.testing.assert_close(problem.run(window).double(), problem.expected(window), **kind.tolerance)


@every_kind
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
def test_a_prompt_beside_decoding_rows(head_dim: int, window: int, kind: Attention) -> None:
    """A row of a prompt must not see the tokens after it, which are in the cache already."""
    if kind.tiles and head_dim % STEP:
        pytest.skip("tiles take heads of a multiple of 32")
    problem = Problem.make(PROMPT_AND_DECODE, head_dim=head_dim, kind=kind)

    torch.testing.assert_close(problem.run(window).double(), problem.expected(window), **kind.tolerance)


@without_amx
@pytest.mark.parametrize("window", [0, 20])
def test_tiles_round_queries_and_numerators_and_nothing_else(window: int) -> None:
    problem = Problem.make(PROMPT_AND_DECODE, head_dim=64, kind=TILES)
    problem.queries = problem.queries.bfloat16().float()
    expected = []
    for row, (line, position) in enumerate(PROMPT_AND_DECODE):
        first = max(0, position + 1 - window) if window else 0
        k, v = (part[first : position + 1].double().transpose(0, 1) for part in problem.contexts[line])
        scores = problem.queries[row].double().unflatten(0, (KV_HEADS, -1)) @ k.transpose(1, 2)
        numerators = (scores - scores.amax(-1, keepdim=True)).exp()
        expected.append((numerators.bfloat16().double() @ v / numerators.sum(-1, keepdim=True)).flatten())

    error = (problem.run(window).double() - torch.stack(expected)).abs()

    # A numerator in the middle between two of bfloat16 may go either way, by 2^-8 of it at most.
    assert error.max() < 2.0**-8
    assert error.mean() < 1e-5


def test_the_output_is_rounded_to_bfloat16() -> None:
    problem = Problem.make(ONE_ROW_EACH, kind=BFLOAT16)

    assert torch.equal(problem.run(out=torch.bfloat16), problem.run().bfloat16())


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -3e38])
@pytest.mark.parametrize("window", [0, 8])
@every_kind
def test_unused_slots_do_not_leak(kind: Attention, window: int, garbage: float) -> None:
    problem = Problem.make(ONE_ROW_EACH, kind=kind)
    expected = problem.run(window)

    for cache in (problem.keys, problem.values):
        unused = cache.isnan()
        assert unused.any()
        cache[unused] = garbage

    assert expected.isfinite().all()
    assert torch.equal(problem.run(window), expected)


@every_kind
@pytest.mark.parametrize("window", [0, 8])
def test_a_row_is_bit_identical_alone_and_in_a_batch(window: int, kind: Attention) -> None:
    problem = Problem.make(PROMPT_AND_DECODE, group=3, kind=kind)
    together = problem.run(window)

    for row in range(len(PROMPT_AND_DECODE)):
        assert torch.equal(problem.run(window, [row])[0], together[row])
    assert torch.equal(problem.run(window, [5, 1, 22, 9]), together[[5, 1, 22, 9]])


@every_kind
def test_later_tokens_do_not_change_a_row(kind: Attention) -> None:
    short, long = Problem.make([(0, 17)], kind=kind), Problem.make([(0, 17), (0, 40)], kind=kind)
    long.queries[0] = short.queries[0]
    k, v = short.contexts[0]
    for position in range(18):
        block, offset = int(long.tables[0, position // BLOCK_SIZE]), position % BLOCK_SIZE
        write(kind.key_slot(long.keys, block, offset), k[position])
        write(kind.value_slot(long.values, block, offset), v[position])

    assert torch.equal(long.run()[0], short.run()[0])


@every_kind
@pytest.mark.parametrize("shares", [1, 3, 5, 16])
def test_how_prompts_are_shared_out_does_not_change_the_bits(shares: int, kind: Attention) -> None:
    problem = Problem.make(PROMPT_AND_DECODE, kind=kind)

    assert torch.equal(problem.run(shares=shares), problem.run(shares=2))


@every_kind
@pytest.mark.parametrize("group", range(1, 8))
@pytest.mark.parametrize("shares", [1, 3, 5, 16])
def test_how_the_work_is_shared_out_does_not_change_the_bits(shares: int, group: int, kind: Attention) -> None:
    problem = Problem.make(ONE_ROW_EACH, group=group, kind=kind)

    assert torch.equal(problem.run(shares=shares), problem.run(shares=1))
    for row in range(len(ONE_ROW_EACH)):  # of which several share the heads
        assert torch.equal(problem.run(rows=[row], shares=shares)[0], problem.run(shares=1)[row])


def test_a_long_prompt_in_any_chunks() -> None:
    """Rows of a prompt are computed in pieces; where they end must not matter."""
    rows = [(0, position) for position in range(120)]
    for kind in (BFLOAT16, TILES) if has_amx() else (BFLOAT16,):
        problem = Problem.make(rows, group=3, head_dim=64, kind=kind)
        whole = problem.run()
        for cut in (1, 15, 16, 50):
            parts = [problem.run(rows=range(first, min(first + cut, 120))) for first in range(0, 120, cut)]
            assert torch.equal(torch.cat(parts), whole)


def test_large_scores_do_not_overflow() -> None:
    problem = Problem.make(ONE_ROW_EACH)
    problem.queries *= 1000

    torch.testing.assert_close(problem.run().double(), problem.expected(), rtol=1e-3, atol=1e-3)


# Rotary embedding and cache write

HEADS, HEAD_DIM = 4, 32
SLOTS = [16 * 3 + 15, 0, 16 * 2, 16 * 3 + 14]


@dataclass
class Rotated:
    queries: Tensor
    keys: Tensor
    values: Tensor


def rotate(
    qkv: Tensor,
    angles: Tensor,
    norms: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    kind: Attention = FLOAT32,
    shares: int = 1,
) -> Rotated:
    """Run the kernel into a cache of NaNs; angles are [rows, 0] for a layer without rotation."""
    rows = qkv.shape[0]
    queries = torch.full((rows, HEADS, HEAD_DIM), torch.nan)
    keys = torch.full((4, KV_HEADS, HEAD_DIM, BLOCK_SIZE), torch.nan, dtype=qkv.dtype)
    values = torch.full((4, KV_HEADS, BLOCK_SIZE, HEAD_DIM), torch.nan, dtype=qkv.dtype)
    none = torch.empty(0)
    q_norm, k_norm = norms or (none, none)
    for share in range(shares):
        rotate_and_cache(
            share,
            shares,
            as_array(qkv),
            angles.cos().numpy(),
            angles.sin().numpy(),
            q_norm.numpy(),
            k_norm.numpy(),
            np.float32(1e-5),
            np.float32(scale),
            np.array(SLOTS[:rows], np.int64),
            kind.tiles,
            queries.numpy(),
            as_array(keys),
            as_array(values),
        )
    return Rotated(queries, keys, values)


def fused(dtype: torch.dtype, rows: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A fused projection [rows, (heads + 2 * kv_heads) * head_dim] and its three parts by head."""
    qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, v = torch.split(qkv.view(rows, -1, HEAD_DIM), [HEADS, KV_HEADS, KV_HEADS], dim=1)
    return qkv, q, k, v


def turned(heads: Tensor, angles: Tensor) -> Tensor:
    """Each pair (d, d + half) is a complex number, and the rotation a product."""
    first, second = heads.double().chunk(2, dim=-1)
    product = torch.complex(first, second) * torch.exp(1j * angles.double())[:, None, :]
    return torch.cat((product.real, product.imag), dim=-1)


def cached(result: Rotated, rows: int = 4, kind: Attention = FLOAT32) -> tuple[Tensor, Tensor]:
    """Keys and values [rows, kv_heads, head_dim] at the rows' slots."""
    places = [divmod(slot, BLOCK_SIZE) for slot in SLOTS[:rows]]
    keys = [kind.key_slot(result.keys, *place).reshape(KV_HEADS, HEAD_DIM) for place in places]
    values = [kind.value_slot(result.values, *place).reshape(KV_HEADS, HEAD_DIM) for place in places]
    return torch.stack(keys), torch.stack(values)


def angles_of(rows: int = 4) -> Tensor:
    return torch.randn(rows, HEAD_DIM // 2, generator=torch.Generator().manual_seed(1)) * 50


def no_angles(rows: int = 4) -> Tensor:
    return torch.empty(rows, 0)


def assert_rounded(found: Tensor, exact: Tensor) -> None:
    rounding = 2.0**-8 if found.dtype is torch.bfloat16 else 0.0
    torch.testing.assert_close(found.double(), exact.double(), rtol=rounding, atol=2e-6)


@every_kind
def test_queries_are_rotated_and_scaled_and_keys_rotated_into_their_slots(kind: Attention) -> None:
    qkv, q, k, v = fused(kind.dtype)

    result = rotate(qkv, angles_of(), scale=0.25, kind=kind)

    keys, values = cached(result, kind=kind)
    torch.testing.assert_close(result.queries.double(), 0.25 * turned(q, angles_of()), rtol=0, atol=2e-6)
    assert_rounded(keys, turned(k, angles_of()))
    assert torch.equal(values, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_without_rotation(dtype: torch.dtype) -> None:
    qkv, q, k, v = fused(dtype)

    result = rotate(qkv, no_angles())

    assert torch.equal(result.queries, q.float())
    keys, values = cached(result)
    assert torch.equal(keys, k)
    assert torch.equal(values, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("angles", [angles_of(), no_angles()], ids=["rope", "no-rope"])
def test_norms_of_heads_come_before_the_rotation(angles: Tensor, dtype: torch.dtype) -> None:
    qkv, q, k, v = fused(dtype)
    norms = torch.rand(2, HEAD_DIM, generator=torch.Generator().manual_seed(2)) + 0.5
    q_normed, k_normed = (
        functional.rms_norm(part.double(), (HEAD_DIM,), norm.double(), 1e-5)
        for part, norm in zip((q, k), norms, strict=True)
    )
    if angles.numel():
        q_normed, k_normed = turned(q_normed, angles), turned(k_normed, angles)

    result = rotate(qkv, angles, (norms[0], norms[1]))

    keys, values = cached(result)
    torch.testing.assert_close(result.queries.double(), q_normed, rtol=0, atol=4e-6)
    assert_rounded(keys, k_normed)
    assert torch.equal(values, v)


@every_kind
def test_no_other_slot_is_touched(kind: Attention) -> None:
    result = rotate(fused(kind.dtype)[0], angles_of(), kind=kind)

    for slot in SLOTS:
        kind.key_slot(result.keys, *divmod(slot, BLOCK_SIZE))[:] = torch.nan
        kind.value_slot(result.values, *divmod(slot, BLOCK_SIZE))[:] = torch.nan

    assert result.keys.isnan().all()
    assert result.values.isnan().all()


@pytest.mark.parametrize("shares", [2, 3, 50])
def test_rotation_is_bit_identical_alone_and_in_a_batch_however_it_is_shared_out(shares: int) -> None:
    qkv, *_ = fused(torch.float32)
    alone = rotate(qkv[:1], angles_of()[:1])
    one = rotate(qkv, angles_of())
    shared = rotate(qkv, angles_of(), shares=shares)

    assert torch.equal(alone.queries, one.queries[:1])
    assert torch.equal(cached(alone, 1)[0], cached(one, 1)[0])
    assert torch.equal(one.queries, shared.queries)
    assert torch.equal(cached(one)[0], cached(shared)[0])
    assert torch.equal(cached(one)[1], cached(shared)[1])
