"""Which decoding steps are recorded, and when; recording itself needs a GPU."""

import pytest
import torch

from engine.activation import PositiveBranch
from engine.kernels.triton.graphs import Body, CudaRecorder, DecodeGraphs, Variant, ladder, padded, run_each_time

SILU = PositiveBranch.SILU


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (16, (1, 2, 4, 8, 16)), (48, (1, 2, 4, 8, 16, 32, 48))],
)
def test_the_ladder_has_powers_of_two_and_the_largest_batch(most: int, sizes: tuple[int, ...]) -> None:
    assert ladder(most) == sizes


def test_no_batch_is_no_ladder() -> None:
    with pytest.raises(ValueError, match="at least 1 row, got 0"):
        ladder(0)


def test_a_batch_is_padded_to_the_next_step_of_the_ladder() -> None:
    sizes = ladder(48)

    assert [padded(rows, sizes) for rows in (1, 2, 3, 17, 33, 48)] == [1, 2, 4, 32, 48, 48]
    assert padded(49, sizes) is None


class Journal:
    """Writes down what is run and what is recorded."""

    def __init__(self) -> None:
        self.ran: list[Variant] = []
        self.recordings = 0

    def body(self, variant: Variant) -> None:
        self.ran.append(variant)

    def record(self, body: Body) -> Body:
        self.recordings += 1
        return body


def test_each_variant_is_recorded_once_and_replayed_often() -> None:
    journal = Journal()
    graphs = DecodeGraphs(journal.body, (1, 2), journal.record)

    for _ in range(3):
        graphs.run((2, False, SILU))
        graphs.run((2, True, SILU))

    assert journal.recordings == 2
    assert journal.ran == [(2, False, SILU), (2, True, SILU)] * 3


def test_everything_is_prepared_largest_first() -> None:
    journal = Journal()
    graphs = DecodeGraphs(journal.body, (1, 2, 3), journal.record)

    graphs.prepare(skip_zeros=(False, True), positive_branch=SILU)

    assert [(rows, skip) for rows, skip, _ in graphs.recorded] == [
        (3, False),
        (3, True),
        (2, False),
        (2, True),
        (1, False),
        (1, True),
    ]
    graphs.run((2, True, SILU))
    assert journal.recordings == 6


def test_without_graphs_each_replay_launches_anew() -> None:
    journal = Journal()
    graphs = DecodeGraphs(journal.body, (1,), run_each_time)
    graphs.prepare(skip_zeros=(False,), positive_branch=SILU)

    graphs.run((1, False, SILU))

    assert len(journal.ran) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_replay_reads_what_its_memory_holds_then() -> None:
    source, target = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
    graphs = DecodeGraphs(lambda variant: target.copy_(source * variant[0]), (2,), CudaRecorder())
    graphs.prepare(skip_zeros=(False,), positive_branch=SILU)

    source.fill_(5)
    graphs.run((2, False, SILU))

    assert target.tolist() == [10] * 4
