"""What steps read and are spared, in neurons, operations and bytes."""

import pytest

from engine.ffn_work import FfnWork, WeightSizes

SIZES = WeightSizes(layers=1_000_000, neuron=10, head=50_000, embedding_row=100)
HIDDEN, NEURONS = 64, 1000


@pytest.fixture
def work() -> FfnWork:
    return FfnWork(HIDDEN, NEURONS, SIZES)


def test_a_dense_step_reads_everything_once_whatever_its_rows(work: FfnWork) -> None:
    work.add(rows=7, head_reads=1, neurons_read=None, relu_rows=7, relu_zeros=99)

    assert (work.neurons_read, work.neurons_skipped, work.flops_skipped) == (NEURONS, 0, 0)
    assert work.weight_bytes == 1_000_000 + 50_000 + 7 * 100


def test_a_skipped_neuron_is_not_read(work: FfnWork) -> None:
    work.add(rows=1, head_reads=1, neurons_read=NEURONS - 40, relu_rows=1, relu_zeros=40)

    assert (work.neurons_read, work.neurons_skipped) == (NEURONS - 40, 40)
    assert work.weight_bytes == 1_000_000 - 40 * 10 + 50_000 + 100


def test_up_is_spared_what_no_row_needs_and_down_each_rows_zeros(work: FfnWork) -> None:
    work.add(rows=3, head_reads=1, neurons_read=NEURONS - 40, relu_rows=2, relu_zeros=130)

    assert work.flops_skipped == 2 * HIDDEN * (2 * 40 + 130)


def test_without_skipping_a_gate_value_takes_three_products(work: FfnWork) -> None:
    assert work.dense_flops(elements=5) == 5 * 3 * 2 * HIDDEN


def test_a_step_of_unfinished_prompts_does_not_read_the_head(work: FfnWork) -> None:
    work.add(rows=5, head_reads=0, neurons_read=None, relu_rows=0, relu_zeros=0)

    assert work.weight_bytes == 1_000_000 + 5 * 100


def test_steps_add_up(work: FfnWork) -> None:
    for _ in range(3):
        work.add(rows=1, head_reads=1, neurons_read=NEURONS - 1, relu_rows=1, relu_zeros=1)

    assert (work.neurons_read, work.neurons_skipped) == (3 * (NEURONS - 1), 3)
    assert work.flops_skipped == 3 * 2 * HIDDEN * 2
