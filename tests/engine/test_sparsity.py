"""Zeros are counted by mode and layer."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.activation import MODE_CODE, MODES, ActivationMode
from engine.sparsity import SparsityCounters

SILU, STOCHASTIC, RELU = MODES
INTERMEDIATE = 100


def add(counters: SparsityCounters, modes: list[ActivationMode], zeros: list[list[int]]) -> None:
    """Count a step: each row's mode, and zeros [layers][rows]."""
    codes = np.array([MODE_CODE[mode] for mode in modes], np.int64)
    counters.add(codes, np.array(zeros, np.int64).reshape(len(zeros), len(modes)), INTERMEDIATE)


def test_rows_of_a_step_go_to_their_mode_and_layer() -> None:
    counters = SparsityCounters(num_layers=2)

    add(counters, [RELU, SILU, RELU, STOCHASTIC], [[90, 0, 70, 13], [50, 1, 60, 17]])
    zeros, elements = counters.by_mode()

    assert zeros == {SILU: [0, 1], STOCHASTIC: [13, 17], RELU: [160, 110]}
    assert elements == {SILU: [100, 100], STOCHASTIC: [100, 100], RELU: [200, 200]}
    assert counters.share(RELU) == (270, 400)


def test_nothing_is_seen_at_first() -> None:
    counters = SparsityCounters(num_layers=3)

    add(counters, [], [[], [], []])

    assert [counters.share(mode) for mode in MODES] == [(0, 0)] * 3


def test_all_is_forgotten_after_a_reset() -> None:
    counters = SparsityCounters(num_layers=1)
    add(counters, [RELU, STOCHASTIC], [[9, 8]])

    counters.reset()

    assert [counters.share(mode) for mode in MODES] == [(0, 0)] * 3


ROW = st.tuples(st.sampled_from(MODES), st.lists(st.integers(0, INTERMEDIATE), min_size=3, max_size=3))


@settings(deadline=None)
@given(steps=st.lists(st.lists(ROW, max_size=6), max_size=8))
def test_counts_add_up(steps: list[list[tuple[ActivationMode, list[int]]]]) -> None:
    counters = SparsityCounters(num_layers=3)

    for rows in steps:
        add(counters, [mode for mode, _ in rows], [[counts[layer] for _, counts in rows] for layer in range(3)])

    zeros, elements = counters.by_mode()
    for mode in MODES:
        mine = [counts for rows in steps for kind, counts in rows if kind is mode]
        assert zeros[mode] == [sum(counts[layer] for counts in mine) for layer in range(3)]
        assert elements[mode] == [INTERMEDIATE * len(mine)] * 3
        assert counters.share(mode) == (sum(zeros[mode]), sum(elements[mode]))


def test_a_snapshot_does_not_move_with_the_counters() -> None:
    counters = SparsityCounters(num_layers=1)
    before = counters.by_mode()

    add(counters, [RELU], [[9]])

    assert before[0][RELU] == [0]
    assert counters.by_mode()[0][RELU] == [9]
