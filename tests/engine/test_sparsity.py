"""Zeros are counted by mode and layer."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.activation import MODE_CODE, MODES, ActivationMode
from engine.sparsity import SparsityCounters

SILU, STOCHASTIC, RELU = MODES
INTERMEDIATE = 100


def add(counters: SparsityCounters, layer: int, rows: list[tuple[ActivationMode, int]]) -> None:
    modes = np.array([MODE_CODE[mode] for mode, _ in rows], np.int64)
    counters.add(layer, modes, np.array([zeros for _, zeros in rows], np.int64), INTERMEDIATE)


def test_rows_of_a_step_go_to_their_mode_and_layer() -> None:
    counters = SparsityCounters(num_layers=2)

    add(counters, 0, [(RELU, 90), (SILU, 0), (RELU, 70), (STOCHASTIC, 13)])
    add(counters, 1, [(RELU, 50), (SILU, 1), (RELU, 60), (STOCHASTIC, 17)])
    zeros, elements = counters.by_mode()

    assert zeros == {SILU: [0, 1], STOCHASTIC: [13, 17], RELU: [160, 110]}
    assert elements == {SILU: [100, 100], STOCHASTIC: [100, 100], RELU: [200, 200]}
    assert counters.share(RELU) == (270, 400)


def test_nothing_is_seen_at_first() -> None:
    counters = SparsityCounters(num_layers=3)

    add(counters, 1, [])

    assert [counters.share(mode) for mode in MODES] == [(0, 0)] * 3


STEP = st.tuples(
    st.integers(0, 2), st.lists(st.tuples(st.sampled_from(MODES), st.integers(0, INTERMEDIATE)), max_size=6)
)


@settings(deadline=None)
@given(steps=st.lists(STEP, max_size=8))
def test_counts_add_up(steps: list[tuple[int, list[tuple[ActivationMode, int]]]]) -> None:
    counters = SparsityCounters(num_layers=3)

    for layer, rows in steps:
        add(counters, layer, rows)

    zeros, elements = counters.by_mode()
    for mode in MODES:
        mine = [(layer, count) for layer, rows in steps for kind, count in rows if kind is mode]
        assert zeros[mode] == [sum(count for at, count in mine if at == layer) for layer in range(3)]
        assert elements[mode] == [INTERMEDIATE * sum(at == layer for at, _ in mine) for layer in range(3)]
        assert counters.share(mode) == (sum(zeros[mode]), sum(elements[mode]))


def test_a_snapshot_does_not_move_with_the_counters() -> None:
    counters = SparsityCounters(num_layers=1)
    before = counters.by_mode()

    add(counters, 0, [(RELU, 9)])

    assert before[0][RELU] == [0]
    assert counters.by_mode()[0][RELU] == [9]
