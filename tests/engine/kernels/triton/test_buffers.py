"""A step's inputs in memory that stays in place."""

from dataclasses import replace

import pytest
import torch

from engine.activation import Activation, PositiveBranch
from engine.kernels.triton.buffers import PADDING_MODE, PADDING_SLOT, StepBuffers
from engine.step import StepInputs
from tests.engine.kernels.triton.devices import DEVICE
from tests.engine.steps import Chunk, blocks_of, step_inputs

STOCHASTIC = Activation("stochastic", p=0.3, seed=5)


def decoding_step(lengths: list[int]) -> StepInputs:
    """One token of each of some sequences."""
    count = len(lengths)
    chunks = [
        Chunk([7 + line], length - 1, blocks_of(line, length, count), STOCHASTIC, sample=line)
        for line, length in enumerate(lengths)
    ]
    return step_inputs(chunks)


def mixed_step() -> StepInputs:
    return step_inputs([Chunk([3, 4, 5], 14, [1, 4]), Chunk([9], 2, [0], STOCHASTIC)])


def loaded(buffers: StepBuffers, step: StepInputs, padded: int, tokens_per_tile: int = 2) -> object:
    tiles = buffers.load(step, tokens_per_tile=tokens_per_tile, padded=padded)
    return buffers.step(rows=padded, tiles=tiles, programs=1, positive_branch=PositiveBranch.SILU)


def make(rows: int = 8, sequences: int = 4, blocks: int = 5) -> StepBuffers:
    return StepBuffers(rows=rows, sequences=sequences, blocks=blocks, device=DEVICE)


@pytest.mark.parametrize("step", [decoding_step([1, 33, 20]), mixed_step()], ids=["decoding", "mixed"])
def test_a_step_arrives_as_it_was(step: StepInputs) -> None:
    found = loaded(make(), step, len(step.token_ids))

    for name in ("token_ids", "positions", "slots", "row_sequence"):
        assert torch.equal(getattr(found, name).cpu(), getattr(step, name)), name
    for name in ("mode", "threshold", "keys", "positions"):
        assert torch.equal(getattr(found.activations, name).cpu(), getattr(step.activations, name)), name
    sequences, blocks = step.block_tables.shape
    assert torch.equal(found.block_tables[:sequences, :blocks].cpu(), step.block_tables)


def test_rows_attend_in_tiles_of_one_sequence() -> None:
    found = loaded(make(), mixed_step(), 4)

    assert (found.tiles.first.tolist(), found.tiles.count.tolist()) == ([0, 2, 3], [2, 1, 1])


def test_padding_writes_nothing_and_attends_to_nothing_and_is_not_counted() -> None:
    buffers = make()
    loaded(buffers, decoding_step([5, 6, 7, 8]), 4)
    buffers.load(decoding_step([9]), tokens_per_tile=2, padded=4)

    found = buffers.step(rows=4, tiles=4, programs=1, positive_branch=PositiveBranch.SILU)

    assert found.slots[1:].tolist() == [PADDING_SLOT] * 3
    assert found.activations.mode[1:].tolist() == [PADDING_MODE] * 3
    assert found.tiles.count.tolist() == [1, 0, 0, 0]
    assert found.token_ids[1:].tolist() == [0] * 3


def test_a_view_made_before_sees_the_next_step() -> None:
    """Recorded launches read what is loaded when they are replayed."""
    buffers = make()
    view = buffers.step(rows=2, tiles=2, programs=1, positive_branch=PositiveBranch.SILU)

    buffers.load(decoding_step([3, 40]), tokens_per_tile=2, padded=2)

    assert view.token_ids.tolist() == [7, 8]
    assert view.positions.tolist() == view.activations.positions.tolist() == [2, 39]
    assert view.tiles.count.tolist() == [1, 1]


def test_fields_begin_where_kernels_expect_it() -> None:
    found = loaded(make(rows=5), decoding_step([3]), 1)

    tensors = (found.token_ids, found.slots, found.activations.keys, found.row_sequence, found.tiles.count)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


@pytest.mark.parametrize(
    ("step", "padded"),
    [(decoding_step([3] * 4), 9), (decoding_step([3] * 4), 3), (decoding_step([3] * 5), 5), (decoding_step([90]), 1)],
    ids=["too many rows", "fewer than the step has", "too many sequences", "too many blocks"],
)
def test_a_step_that_does_not_fit_is_refused(step: StepInputs, padded: int) -> None:
    with pytest.raises(ValueError, match="does not fit buffers for 8 rows, 4 sequences and 5 blocks"):
        make().load(step, tokens_per_tile=1, padded=padded)


def test_the_steps_own_tensors_are_left_alone() -> None:
    step = decoding_step([3, 4])
    before = replace(step, token_ids=step.token_ids.clone())
    buffers = make()
    loaded(buffers, step, 2)

    loaded(buffers, decoding_step([30]), 2)

    assert torch.equal(step.token_ids, before.token_ids)
