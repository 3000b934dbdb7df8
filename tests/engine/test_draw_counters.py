"""Drawn probabilities are counted for stochastic rows, and only for them."""

import numpy as np
import pytest

from engine.activation import ALWAYS_SILU, MODE_CODE, ActivationMode
from engine.draw_counters import DrawCounters

SILU, STOCHASTIC, RELU = (MODE_CODE[mode] for mode in ActivationMode)


def add(
    counters: DrawCounters, modes: list[int], p: list[float], zeros: list[list[int]], kept: list[list[int]]
) -> None:
    thresholds = np.array([round(share * ALWAYS_SILU) for share in p], np.int64)
    counters.add(np.array(modes), thresholds, np.array(zeros), np.array(kept))


def test_negative_values_are_those_that_were_kept_and_those_that_were_not() -> None:
    counters = DrawCounters()

    add(counters, [STOCHASTIC], [0.5], zeros=[[30], [40]], kept=[[34], [37]])

    assert (counters.kept, counters.negatives) == (71, 141)
    assert counters.expected == pytest.approx(0.5 * 141)


def test_each_row_expects_its_own_p() -> None:
    counters = DrawCounters()

    add(counters, [STOCHASTIC, STOCHASTIC], [0.25, 0.75], zeros=[[80, 10]], kept=[[20, 30]])

    assert counters.expected == pytest.approx(0.25 * 100 + 0.75 * 40)


def test_rows_of_other_modes_do_not_count() -> None:
    counters = DrawCounters()

    add(counters, [SILU, RELU], [1.0, 0.0], zeros=[[0, 50]], kept=[[50, 0]])
    add(counters, [SILU, STOCHASTIC, RELU], [1.0, 1.0, 0.0], zeros=[[0, 0, 50]], kept=[[50, 40, 0]])

    assert (counters.kept, counters.negatives, counters.expected) == (40, 40, 40.0)


def test_all_is_forgotten_after_a_reset() -> None:
    counters = DrawCounters()
    add(counters, [STOCHASTIC], [0.5], zeros=[[3]], kept=[[4]])

    counters.reset()

    assert (counters.kept, counters.negatives, counters.expected) == (0, 0, 0.0)
