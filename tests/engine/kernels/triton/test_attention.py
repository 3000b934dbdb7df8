"""Paged attention against PyTorch's in float64, and each row's bits against those it has in any other step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.kernels.triton.attention import (
    KEY_TILE,
    QUERY_TILE,
    AttentionWorkspace,
    QueryTiles,
    list_tiles,
    paged_attention,
    tokens_per_tile,
)
from engine.kv_cache import BLOCK_SIZE, blocks_for
from tests.engine.kernels.triton.devices import DEVICE, every_dtype
from tests.engine.steps import blocks_of

KV_HEADS = 2
MAX_TOKENS = 192
SPLIT = 64
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@dataclass
class Problem:
    """Sequences whose last tokens attend; cache slots that none of them has written hold garbage."""

    q: Tensor  # [rows, num_heads, head_dim]
    lines: list[int]  # each row's sequence
    positions: list[int]
    contexts: list[tuple[Tensor, Tensor]]  # keys and values of each sequence [length, kv_heads, head_dim]
    keys: Tensor
    values: Tensor
    tables: Tensor

    @classmethod
    def make(
        cls,
        rows: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        *,
        group: int = 2,
        head_dim: int = 16,
        garbage: float = torch.nan,
    ) -> "Problem":
        """Rows are (sequence, position); a sequence is as long as its last row says."""
        generator = torch.Generator().manual_seed(group)
        lengths: dict[int, int] = {}
        for line, position in rows:
            lengths[line] = max(lengths.get(line, 0), position + 1)
        count, width = len(lengths), max(map(blocks_for, lengths.values()))
        keys = torch.full((count * width, KV_HEADS, head_dim, BLOCK_SIZE), garbage, dtype=dtype)
        values = torch.full((count * width, KV_HEADS, BLOCK_SIZE, head_dim), garbage, dtype=dtype)
        tables = torch.zeros(count, width, dtype=torch.int32)
        contexts = []
        for line in range(count):
            k, v = torch.randn(2, lengths[line], KV_HEADS, head_dim, generator=generator).to(dtype)
            blocks = blocks_of(line, lengths[line], count)
            tables[line, : len(blocks)] = torch.tensor(blocks)
            for position in range(lengths[line]):
                block, offset = blocks[position // BLOCK_SIZE], position % BLOCK_SIZE
                keys[block, :, :, offset], values[block, :, offset] = k[position], v[position]
            contexts.append((k, v))
        q = 2 * torch.randn(len(rows), KV_HEADS * group, head_dim, generator=generator).to(dtype)
        lines, positions = [line for line, _ in rows], [position for _, position in rows]
        return cls(q, lines, positions, contexts, keys.to(DEVICE), values.to(DEVICE), tables.to(DEVICE))

    def run(
        self,
        window: int | None = None,
        *,
        rows: Sequence[int] | None = None,
        tokens: int | None = None,
        programs: int = 1,
    ) -> Tensor:
        """The kernel's answer for some of the rows, all by default.

        Args:
            window: As in the kernel.
            rows: Which.
            tokens: Most rows of a tile.
            programs: Programs that share a tile.
        """
        chosen = list(range(len(self.lines)) if rows is None else rows)
        _, num_heads, head_dim = self.q.shape
        lines = np.array([self.lines[row] for row in chosen], np.int32)
        first, count = list_tiles(lines, tokens or tokens_per_tile(num_heads // KV_HEADS))
        out = torch.full((len(chosen), num_heads * head_dim), torch.nan, dtype=self.q.dtype, device=DEVICE)
        paged_attention(
            self.q[chosen].to(DEVICE),
            self.keys,
            self.values,
            self.tables,
            torch.from_numpy(lines).to(DEVICE),
            torch.tensor([self.positions[row] for row in chosen], dtype=torch.int64, device=DEVICE),
            QueryTiles(torch.from_numpy(first).to(DEVICE), torch.from_numpy(count).to(DEVICE), programs),
            window=window,
            workspace=AttentionWorkspace(
                num_heads,
                KV_HEADS,
                head_dim,
                max_tokens=MAX_TOKENS,
                max_rows=max(1, len(chosen)),
                device=DEVICE,
                split=SPLIT,
            ),
            out=out,
        )
        return out.cpu()

    def expected(self, window: int | None = None) -> Tensor:
        """PyTorch's attention in float64, row by row."""
        return torch.stack([self._expected_row(row, window) for row in range(len(self.lines))])

    def _expected_row(self, row: int, window: int | None) -> Tensor:
        end = self.positions[row] + 1
        first = max(0, end - window) if window else 0
        k, v = (part[first:end].double().transpose(0, 1)[None] for part in self.contexts[self.lines[row]])
        q = self.q[row].double()[None, :, None, :]
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).flatten()


# Three splits, some not full, a prompt of several tiles, and the first and last token of a block and of a split.
PROMPT_AND_DECODE = [*((0, position) for position in range(56, 74)), (1, 150), (2, 0), (3, 63), (4, 64), (5, 15)]


@every_dtype
@pytest.mark.parametrize("window", [None, 1, 17, 70, 1000])
def test_a_prompt_beside_decoding_rows_equals_pytorch(window: int | None, dtype: torch.dtype) -> None:
    """A row of a prompt must not see the tokens after it, which are in the cache already."""
    problem = Problem.make(PROMPT_AND_DECODE, dtype)

    found = problem.run(window)

    torch.testing.assert_close(found.double(), problem.expected(window), rtol=0, atol=TOLERANCE[dtype])


@every_dtype
@pytest.mark.parametrize("group", [1, 3, 7, 2 * QUERY_TILE])
def test_heads_that_share_keys(group: int, dtype: torch.dtype) -> None:
    problem = Problem.make([(0, 9), (0, 10), (1, 70)], dtype, group=group)

    torch.testing.assert_close(problem.run().double(), problem.expected(), rtol=0, atol=TOLERANCE[dtype])


@every_dtype
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_widths_of_heads(head_dim: int, dtype: torch.dtype) -> None:
    problem = Problem.make([(0, 20), (0, 21), (1, 70)], dtype, head_dim=head_dim)

    torch.testing.assert_close(problem.run().double(), problem.expected(), rtol=0, atol=TOLERANCE[dtype])


@every_dtype
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("programs", [2, 3])
def test_splits_shared_by_programs_give_the_same_bits(programs: int, window: int | None, dtype: torch.dtype) -> None:
    problem = Problem.make([(0, 127), (0, 128), (1, 150), (2, 5)], dtype)

    assert torch.equal(problem.run(window, programs=programs), problem.run(window))


@every_dtype
@pytest.mark.parametrize("window", [None, 17])
def test_a_row_has_the_same_bits_alone_and_in_a_step(window: int | None, dtype: torch.dtype) -> None:
    """Token by token, as in decoding, or in a tile with others, which begin and end elsewhere."""
    problem = Problem.make(PROMPT_AND_DECODE, dtype, group=3)
    together = problem.run(window)

    for row in (0, 7, 8, 18):
        assert torch.equal(problem.run(window, rows=[row], programs=2)[0], together[row])
    assert torch.equal(problem.run(window, rows=range(5, 18), tokens=5), together[5:18])


@every_dtype
def test_unused_slots_do_not_leak(dtype: torch.dtype) -> None:
    rows = [(0, 20), (1, 70)]
    clean, dirty = (Problem.make(rows, dtype, garbage=garbage) for garbage in (0.0, torch.inf))

    assert torch.equal(dirty.run(), clean.run())


def test_where_blocks_lie_does_not_matter() -> None:
    problem = Problem.make([(0, 40), (1, 70)], torch.float32)
    before = problem.run()
    order = torch.randperm(len(problem.keys), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    problem.keys[order], problem.values[order] = problem.keys.clone(), problem.values.clone()
    problem.tables = order[problem.tables.long()].int()

    assert torch.equal(problem.run(), before)


def test_no_rows() -> None:
    problem = Problem.make([(0, 3)], torch.float32)

    assert problem.run(rows=[]).shape == (0, 64)


def test_a_tile_of_no_rows_writes_nothing() -> None:
    out = torch.full((1, 16), 7.0, device=DEVICE)
    cache = torch.zeros(1, 1, 16, BLOCK_SIZE, device=DEVICE)
    nothing = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    paged_attention(
        torch.zeros(1, 1, 16, device=DEVICE),
        cache,
        cache.clone(),
        nothing[None],
        nothing,
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        QueryTiles(nothing, nothing, 1),
        window=None,
        workspace=AttentionWorkspace(1, 1, 16, max_tokens=16, max_rows=1, device=DEVICE),
        out=out,
    )

    assert (out == 7).all()


def test_tiles_hold_consecutive_tokens_of_one_sequence() -> None:
    first, count = list_tiles(np.array([0, 0, 0, 0, 0, 1, 2, 2], np.int32), 2)

    assert (first.tolist(), count.tolist()) == ([0, 2, 4, 5, 6], [2, 2, 1, 1, 2])
    assert [part.tolist() for part in list_tiles(np.empty(0, np.int32), 2)] == [[], []]


@pytest.mark.parametrize(("group", "tokens"), [(1, 32), (3, 10), (8, 4), (32, 1), (71, 1)])
def test_tokens_of_a_tile(group: int, tokens: int) -> None:
    assert tokens_per_tile(group) == tokens


def test_few_rows_share_their_splits_among_more_programs_than_many() -> None:
    workspace = AttentionWorkspace(32, 8, 64, max_tokens=8192, max_rows=64, device=torch.device("cpu"))

    shares = [workspace.programs(rows, rows) for rows in (1, 2, 8, 33, 64)]

    assert shares == [33, 17, 5, 1, 1]
    assert workspace.sums.shape[:2] == (33, 64)


def test_a_short_context_needs_no_workspace() -> None:
    workspace = AttentionWorkspace(32, 8, 64, max_tokens=128, max_rows=64, device=torch.device("cpu"))

    assert workspace.programs(1, 1) == 1
    assert workspace.sums.numel() == 0


def test_what_the_kernel_would_misread_is_refused() -> None:
    problem = Problem.make([(0, 3)], torch.float32)
    problem.values = problem.values.bfloat16()

    with pytest.raises(ValueError, match=r"values must be torch\.float32"):
        problem.run()
    with pytest.raises(ValueError, match=f"split must be a multiple of {KEY_TILE}, got 100"):
        AttentionWorkspace(1, 1, 16, max_tokens=16, max_rows=1, device=DEVICE, split=100)
