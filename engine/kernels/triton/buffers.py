"""A step's inputs on the device, in memory that stays in place from step to step."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.activation import ActivationRows, PositiveBranch
from engine.kernels.triton.attention import QueryTiles, list_tiles
from engine.step import StepInputs

_ROUND = 16  # each field begins at a multiple of so many elements: kernels are compiled for aligned memory

# Fields of one row, int64; the two words of a key are neighbours and come last.
_TOKEN, _POSITION, _SLOT, _MODE, _THRESHOLD, _KEYS = range(6)
# int32
_SEQUENCE, _FIRST, _COUNT = range(3)

PADDING_SLOT = -1  # writes nothing to the cache
PADDING_MODE = -1  # is not counted


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """What the kernels of a step read; see `StepInputs` for the fields of the same names."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    row_sequence: Tensor
    block_tables: Tensor
    activations: ActivationRows
    tiles: QueryTiles


class StepBuffers:
    """Room for one step.

    Args:
        rows: Most rows.
        sequences: Most sequences.
        blocks: Most cache blocks of one sequence.
        device: Where the kernels run.
    """

    def __init__(self, *, rows: int, sequences: int, blocks: int, device: torch.device) -> None:
        self.rows, self.sequences, self.blocks = rows, sequences, blocks
        self._stride = -(-rows // _ROUND) * _ROUND
        self._fields = torch.zeros((_KEYS + 2) * self._stride, dtype=torch.int64, device=device)
        self._words = torch.zeros(3 * self._stride, dtype=torch.int32, device=device)
        self._tables = torch.zeros(sequences, -(-blocks // _ROUND) * _ROUND, dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._host_fields, self._host_words, self._host_tables = (
            torch.zeros_like(tensor, device="cpu", pin_memory=pinned)
            for tensor in (self._fields, self._words, self._tables)
        )
        self._copied = torch.cuda.Event() if pinned else None
        self._pad(0, rows)
        self._copy(sequences)

    def load(self, step: StepInputs, *, tokens_per_tile: int, padded: int) -> int:
        """Copy a step's inputs to the device, without waiting for the copy's end.

        Args:
            step: On the CPU.
            tokens_per_tile: Rows of a sequence that attend together.
            padded: Rows from the step's last to this number become rows that do nothing.

        Returns:
            Number of query tiles.

        Raises:
            ValueError: The step does not fit.
        """
        rows, (sequences, blocks) = len(step.token_ids), step.block_tables.shape
        if padded < rows or padded > self.rows or sequences > self.sequences or blocks > self.blocks:
            raise ValueError(
                f"a step of {rows} rows, padded to {padded}, of {sequences} sequences of {blocks} blocks does not fit "
                f"buffers for {self.rows} rows, {self.sequences} sequences and {self.blocks} blocks"
            )
        if self._copied is not None:
            self._copied.synchronize()  # a copy that still runs reads what is written now
        fields = self._host_fields.numpy()
        stride, activations = self._stride, step.activations
        for place, values in (
            (_TOKEN, step.token_ids),
            (_POSITION, step.positions),
            (_SLOT, step.slots),
            (_MODE, activations.mode),
            (_THRESHOLD, activations.threshold),
        ):
            fields[place * stride : place * stride + rows] = values.numpy()
        fields[_KEYS * stride : _KEYS * stride + 2 * rows] = activations.keys.numpy().reshape(-1)
        words, row_sequence = self._host_words.numpy().reshape(3, stride), step.row_sequence.numpy()
        first, count = list_tiles(row_sequence, tokens_per_tile)
        self._pad(rows, padded)
        words[_SEQUENCE, :rows] = row_sequence
        words[_FIRST, : len(first)], words[_COUNT, : len(count)] = first, count
        self._host_tables.numpy()[:sequences, :blocks] = step.block_tables.numpy()
        self._copy(sequences)
        return len(first)

    def step(self, *, rows: int, tiles: int, programs: int, positive_branch: PositiveBranch) -> DeviceStep:
        """The first `rows` rows and `tiles` query tiles, whatever is or will be loaded."""
        words = self._words.view(3, self._stride)
        start = _KEYS * self._stride
        positions = self._field(_POSITION, rows)
        return DeviceStep(
            token_ids=self._field(_TOKEN, rows),
            positions=positions,
            slots=self._field(_SLOT, rows),
            row_sequence=words[_SEQUENCE, :rows],
            block_tables=self._tables,
            activations=ActivationRows(
                mode=self._field(_MODE, rows),
                threshold=self._field(_THRESHOLD, rows),
                keys=self._fields[start : start + 2 * rows].view(rows, 2),
                positions=positions,
                positive_branch=positive_branch,
            ),
            tiles=QueryTiles(words[_FIRST, :tiles], words[_COUNT, :tiles], programs),
        )

    def _field(self, place: int, rows: int) -> Tensor:
        return self._fields[place * self._stride : place * self._stride + rows]

    def _pad(self, first: int, last: int) -> None:
        """Let rows `first` to `last`, and the tiles of the same numbers, do nothing."""
        fields, words = self._host_fields.numpy(), self._host_words.numpy().reshape(3, self._stride)
        empty = {_TOKEN: 0, _POSITION: 0, _SLOT: PADDING_SLOT, _MODE: PADDING_MODE, _THRESHOLD: 0}
        for place, value in empty.items():
            fields[place * self._stride + first : place * self._stride + last] = value
        fields[_KEYS * self._stride + 2 * first : _KEYS * self._stride + 2 * last] = 0
        words[_SEQUENCE, first:last] = 0
        words[_FIRST, first:last] = np.arange(first, last)
        words[_COUNT, first:last] = 0

    def _copy(self, sequences: int) -> None:
        self._fields.copy_(self._host_fields, non_blocking=True)
        self._words.copy_(self._host_words, non_blocking=True)
        self._tables[:sequences].copy_(self._host_tables[:sequences], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
