"""Builds the tensors of a step by hand: what the runner does in the engine, in as few lines as possible."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.activation import MODE_CODE, Activation, ActivationRows, PositiveBranch
from engine.kv_cache import BLOCK_SIZE, blocks_for
from engine.philox import derive_key
from engine.step import StepInputs

SILU = Activation()


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence that a step computes.

    Attributes:
        tokens: The chunk's own token ids.
        start: Position of the first one.
        blocks: The sequence's cache blocks, enough for the chunk's last position.
        activation: Of these tokens; a stochastic one has its seed.
        sample: Index of the sample, part of the random key.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    activation: Activation = SILU
    sample: int = 0


def blocks_of(sequence: int, num_tokens: int, num_sequences: int = 1) -> list[int]:
    """Cache blocks for a sequence of `num_tokens`, interleaved with those of the others and in falling order."""
    return [sequence + num_sequences * index for index in reversed(range(blocks_for(num_tokens)))]


def activation_rows(
    activations: Sequence[Activation],
    positions: Sequence[int],
    branch: PositiveBranch = PositiveBranch.SILU,
    samples: Sequence[int] | None = None,
) -> ActivationRows:
    """One row for each activation and position; samples are 0 if left out."""
    keys = [
        derive_key(activation.seed or 0, sample)
        for activation, sample in zip(activations, samples or [0] * len(activations), strict=True)
    ]
    return ActivationRows(
        mode=torch.tensor([MODE_CODE[activation.mode] for activation in activations], dtype=torch.int64),
        threshold=torch.tensor([activation.threshold for activation in activations], dtype=torch.int64),
        keys=torch.tensor(keys, dtype=torch.int64).reshape(-1, 2),
        positions=torch.tensor(positions, dtype=torch.int64),
        positive_branch=branch,
    )


def select(rows: ActivationRows, index: slice) -> ActivationRows:
    """Some of the rows."""
    return ActivationRows(
        rows.mode[index], rows.threshold[index], rows.keys[index], rows.positions[index], rows.positive_branch
    )


def step_inputs(
    chunks: Sequence[Chunk], branch: PositiveBranch = PositiveBranch.SILU, *, sparse: bool = False
) -> StepInputs:
    """A step that computes these chunks and the logits of every token, in the order of the chunks.

    Args:
        chunks: At least one.
        branch: The checkpoint's positive branch.
        sparse: The feed-forward skips zeros.
    """
    rows = [(line, offset) for line, chunk in enumerate(chunks) for offset in range(len(chunk.tokens))]
    positions = [chunks[line].start + offset for line, offset in rows]
    width = max(len(chunk.blocks) for chunk in chunks)
    tables = [[*chunk.blocks, *[0] * (width - len(chunk.blocks))] for chunk in chunks]
    slots = [
        chunks[line].blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for (line, _), position in zip(rows, positions, strict=True)
    ]
    activations = activation_rows(
        [chunks[line].activation for line, _ in rows], positions, branch, [chunks[line].sample for line, _ in rows]
    )
    return StepInputs(
        token_ids=torch.tensor([chunks[line].tokens[offset] for line, offset in rows]),
        positions=activations.positions,
        slots=torch.tensor(slots),
        row_sequence=torch.tensor([line for line, _ in rows], dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        activations=activations,
        skip_zeros=sparse,
        sample_rows=torch.arange(len(rows)),
        score_rows=torch.empty(0, dtype=torch.int64),
        score_tokens=torch.empty(0, dtype=torch.int64),
    )
