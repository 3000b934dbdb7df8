"""From a plan to the token rows of its step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engine.activation import ALWAYS_SILU, MODE_CODE, ActivationMode, ActivationRows, PositiveBranch
from engine.kv_cache import BLOCK_SIZE
from engine.request import Sequence
from engine.scheduler import ScheduledSequence, StepPlan
from engine.step import StepInputs

IntArray = NDArray[np.integer[Any]]
Items = tuple[ScheduledSequence, ...]

_SILU, _RELU = MODE_CODE[ActivationMode.SILU], MODE_CODE[ActivationMode.RELU]


class StepBuilder:
    """Lays the tokens of plans out as rows.

    The rule is a batch that decodes: the same sequences, one token each, hundreds of times a second, and each time with
    caches that are full of weights. Its arrays stay, and only what is new is written into them.

    Args:
        positive_branch: The checkpoint's.
        skips: Whether a step skips zeros, given its rows in RELU mode and its rows in all.
    """

    def __init__(self, positive_branch: PositiveBranch, skips: Callable[[int, int], bool]) -> None:
        self._positive_branch = positive_branch
        self._skips = skips
        self._decoding: _Decoding | None = None

    def build(self, plan: StepPlan) -> StepInputs:
        """The step. Its tensors are valid until the next call."""
        items = plan.scheduled
        decodes = all(item.count == 1 and item.samples and not item.score_token_ids for item in items)
        decoding = self._decoding
        if decodes and decoding is not None and decoding.advance(items):
            decoding.step.skip_zeros = self._skips(decoding.relu, len(items))
            return decoding.step
        layout = _layout(items)
        tables = np.zeros((len(items), max(len(item.sequence.block_ids) for item in items)), np.int32)
        for line, item in zip(tables, items, strict=True):
            line[: len(item.sequence.block_ids)] = item.sequence.block_ids
        activations = _activations(items, layout)
        slots = tables[layout.sequence, layout.positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE
        slots += layout.positions % BLOCK_SIZE
        positions = torch.from_numpy(layout.positions)
        relu = int((activations.mode == _RELU).sum())
        step = StepInputs(
            token_ids=torch.from_numpy(layout.tokens),
            positions=positions,
            slots=torch.from_numpy(slots),
            row_sequence=torch.from_numpy(layout.sequence),
            block_tables=torch.from_numpy(tables),
            activations=ActivationRows(
                mode=torch.from_numpy(activations.mode),
                threshold=torch.from_numpy(activations.threshold),
                keys=torch.from_numpy(activations.keys),
                positions=positions,
                positive_branch=self._positive_branch,
            ),
            skip_zeros=self._skips(relu, len(slots)),
            sample_rows=torch.from_numpy(layout.sample_rows),
            score_rows=torch.from_numpy(layout.score_rows),
            score_tokens=torch.from_numpy(layout.score_tokens),
        )
        # A row whose activation has yet to begin changes with its position.
        stays = decodes and activations.all_active
        self._decoding = _Decoding(step, relu, items) if stays else None
        return step


class _Decoding:
    """A batch of sequences that each need their next token, and the step that they had last.

    Args:
        step: The step.
        relu: Its rows in RELU mode.
        items: What it computes.
    """

    def __init__(self, step: StepInputs, relu: int, items: Items) -> None:
        self.step = step
        self.relu = relu
        self._sequences = [item.sequence for item in items]
        self._blocks = [item.sequence.block_ids.copy() for item in items]
        # The memory of the step's own tensors.
        self._tokens, self._positions = step.token_ids.numpy(), step.positions.numpy()
        self._slots, self._tables = step.slots.numpy(), step.block_tables.numpy()

    def advance(self, items: Items) -> bool:
        """Turn the step into one of later tokens of the same sequences; False if these are others or need more room."""
        if [item.sequence for item in items] != self._sequences:
            return False
        for row, sequence in enumerate(self._sequences):
            if sequence.block_ids != self._blocks[row] and not self._note_blocks(row, sequence):
                return False
        starts = [item.start for item in items]
        self._positions[:] = starts
        self._tokens[:] = [item.sequence.token_ids[item.start] for item in items]
        self._slots[:] = [
            blocks[start // BLOCK_SIZE] * BLOCK_SIZE + start % BLOCK_SIZE
            for blocks, start in zip(self._blocks, starts, strict=True)
        ]
        return True

    def _note_blocks(self, row: int, sequence: Sequence) -> bool:
        blocks = sequence.block_ids.copy()
        if len(blocks) > self._tables.shape[1]:
            return False
        self._blocks[row] = blocks
        self._tables[row, : len(blocks)] = blocks
        self._tables[row, len(blocks) :] = 0
        return True


class _Layout(NamedTuple):
    """A plan's tokens as rows; see `StepInputs` for the fields of the same names."""

    sequence: NDArray[np.int32]
    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    sample_rows: NDArray[np.int64]
    score_rows: NDArray[np.int64]
    score_tokens: NDArray[np.int64]


def _layout(items: Items) -> _Layout:
    counts = np.array([item.count for item in items])
    ends = np.cumsum(counts) - 1
    targets = [item.score_token_ids for item in items]
    score_rows = [first + i for first, after in zip(ends - counts + 1, targets, strict=True) for i in range(len(after))]
    spans = [slice(item.start, item.start + item.count) for item in items]
    tokens = np.concatenate([item.sequence.token_ids[span] for item, span in zip(items, spans, strict=True)])
    return _Layout(
        np.repeat(np.arange(len(items), dtype=np.int32), counts),
        tokens.astype(np.int64),
        np.concatenate([np.arange(span.start, span.stop) for span in spans]),
        np.array([end for end, item in zip(ends, items, strict=True) if item.samples], np.int64),
        np.array(score_rows, np.int64),
        np.array([token for after in targets for token in after], np.int64),
    )


@dataclass(frozen=True, slots=True)
class _Activations:
    """Of every row; see `ActivationRows`. `all_active` says that no row comes before its activation begins."""

    mode: IntArray
    threshold: IntArray
    keys: IntArray
    all_active: bool


def _activations(items: Items, layout: _Layout) -> _Activations:
    sequences = [item.sequence for item in items]
    active = layout.positions >= np.array([s.first_active for s in sequences])[layout.sequence]
    modes = np.array([MODE_CODE[s.request.activation.mode] for s in sequences])
    thresholds = np.array([s.threshold for s in sequences], np.int64)
    keys = np.array([s.activation_key for s in sequences], np.int64)
    return _Activations(
        mode=np.where(active, modes[layout.sequence], _SILU),
        threshold=np.where(active, thresholds[layout.sequence], ALWAYS_SILU),
        keys=keys[layout.sequence],
        all_active=bool(active.all()),
    )
