"""Which RELU rows skip their zeros."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import FfnPath
from engine.ffn_router import HIGH_ZEROS, LOW_ZEROS, MEASURED_ROWS, FfnCosts, FfnRouter

# Dense reads the same weights for any number of rows; sparse grows with them, and falls with the zeros.
COSTS = FfnCosts(
    dense=tuple(10.0 + rows for rows in MEASURED_ROWS),
    sparse_low=tuple(6.0 * rows for rows in MEASURED_ROWS),
    sparse_high=tuple(2.0 * rows for rows in MEASURED_ROWS),
)
SHARE = st.floats(0, 1)
ROWS = st.integers(1, 300)


def test_sparse_cost_is_linear_in_the_zeros() -> None:
    one = MEASURED_ROWS.index(1)

    assert COSTS.sparse(one, LOW_ZEROS) == pytest.approx(6)
    assert COSTS.sparse(one, (LOW_ZEROS + HIGH_ZEROS) / 2) == pytest.approx(4)
    assert COSTS.sparse(one, HIGH_ZEROS) == pytest.approx(2)
    assert COSTS.sparse(one, 0.0) == pytest.approx(11)


def test_an_extrapolated_cost_is_never_negative() -> None:
    steep = FfnCosts(dense=(1.0,), sparse_low=(9.0,), sparse_high=(1.0,))

    assert steep.sparse(0, 1.0) == 0


@settings(deadline=None)
@given(rows=ROWS, zeros=SHARE)
@pytest.mark.parametrize("costs", [None, COSTS])
def test_a_given_path_is_taken_whatever_it_costs(costs: FfnCosts | None, rows: int, zeros: float) -> None:
    assert FfnRouter(FfnPath.SPARSE, True, costs).is_sparse(rows, zeros)
    assert not FfnRouter(FfnPath.DENSE, True, costs).is_sparse(rows, zeros)


@settings(deadline=None)
@given(rows=ROWS, zeros=SHARE)
@pytest.mark.parametrize("path", FfnPath)
def test_without_a_sparse_kernel_all_is_dense(path: FfnPath, rows: int, zeros: float) -> None:
    router = FfnRouter(path, has_sparse=False)

    assert not router.is_sparse(rows, zeros)
    assert not router.prompts_may_be_sparse


@settings(deadline=None)
@given(rows=ROWS, zeros=SHARE)
def test_without_costs_the_choice_depends_on_nothing(rows: int, zeros: float) -> None:
    """Deterministic mode: neither batch-mates nor what was seen so far may change a row's path."""
    assert FfnRouter(FfnPath.AUTO, True).is_sparse(rows, zeros)


@pytest.mark.parametrize(
    ("rows", "zeros", "sparse"),
    [
        (1, 0.0, False),  # 11 and 11: a tie is dense
        (1, 0.1, True),
        (2, 0.4, False),  # 14 against 12
        (2, 0.9, True),
        (3, 0.9, True),  # counts as 4 rows: 8 against 14
        (4, 0.6, False),  # 20 against 14
        (16, 0.9, False),  # 32 against 26
        (16, 1.0, True),  # 16 against 26
        (64, 0.9, False),
        (5000, 0.9, False),  # beyond what was measured: as the largest
    ],
)
def test_auto_follows_measured_costs(rows: int, zeros: float, sparse: bool) -> None:
    assert FfnRouter(FfnPath.AUTO, True, COSTS).is_sparse(rows, zeros) is sparse


@settings(deadline=None)
@given(rows=ROWS, low=SHARE, high=SHARE)
def test_more_zeros_never_turn_sparse_into_dense(rows: int, low: float, high: float) -> None:
    router = FfnRouter(FfnPath.AUTO, True, COSTS)

    assert router.is_sparse(rows, max(low, high)) >= router.is_sparse(rows, min(low, high))


@pytest.mark.parametrize("path", FfnPath)
@pytest.mark.parametrize("costs", [None, COSTS])
def test_no_rows_take_no_path(path: FfnPath, costs: FfnCosts | None) -> None:
    assert not FfnRouter(path, True, costs).is_sparse(0, 0.9)


def test_prompts_are_sparse_on_demand_only() -> None:
    may = {path: FfnRouter(path, True).prompts_may_be_sparse for path in FfnPath}

    assert may == {FfnPath.AUTO: False, FfnPath.SPARSE: True, FfnPath.DENSE: False}
