"""Which steps skip zeros."""

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


def test_an_extrapolated_cost_is_never_negative() -> None:
    steep = FfnCosts(dense=(1.0,), sparse_low=(9.0,), sparse_high=(1.0,))

    assert steep.sparse(0, 1.0) == 0


def router_of(path: FfnPath, costs: FfnCosts | None = COSTS) -> FfnRouter:
    return FfnRouter(path, lambda: costs)


@settings(deadline=None)
@given(rows=ROWS, others=st.integers(0, 300), zeros=SHARE)
def test_a_given_path_is_taken_whatever_it_costs(rows: int, others: int, zeros: float) -> None:
    assert router_of(FfnPath.SPARSE).skips(rows, rows + others, zeros)
    assert not router_of(FfnPath.DENSE).skips(rows, rows + others, zeros)


@pytest.mark.parametrize("path", [FfnPath.SPARSE, FfnPath.DENSE])
def test_nothing_is_measured_for_a_given_path(path: FfnPath) -> None:
    def fail() -> FfnCosts:
        raise AssertionError

    assert FfnRouter(path, fail).costs is None


@settings(deadline=None)
@given(rows=ROWS, zeros=SHARE)
def test_without_a_sparse_path_auto_is_dense(rows: int, zeros: float) -> None:
    assert not router_of(FfnPath.AUTO, None).skips(rows, rows, zeros)


@pytest.mark.parametrize(
    ("rows", "zeros", "sparse"),
    [
        (1, 0.49, False),  # fewer zeros than were measured
        (1, 0.5, True),  # 6 against 11
        (2, 0.5, False),  # 12 and 12: a tie is dense
        (2, 0.53, False),  # 11.4 against 12: not worth it
        (2, 0.6, True),  # 10 against 12
        (3, 0.9, True),  # counts as 4 rows: 8 against 14
        (4, 0.6, False),  # 20 against 14
        (16, 0.9, False),  # 32 against 26
        (16, 1.0, True),  # 16 against 26
        (64, 0.9, False),
        (5000, 0.9, False),  # beyond what was measured: as the largest
    ],
)
def test_auto_follows_measured_costs(rows: int, zeros: float, sparse: bool) -> None:
    assert router_of(FfnPath.AUTO).skips(rows, rows, zeros) is sparse


@settings(deadline=None)
@given(rows=ROWS, low=SHARE, high=SHARE)
def test_more_zeros_never_turn_sparse_into_dense(rows: int, low: float, high: float) -> None:
    router = router_of(FfnPath.AUTO)

    assert router.skips(rows, rows, max(low, high)) >= router.skips(rows, rows, min(low, high))


@settings(deadline=None)
@given(rows=ROWS, others=ROWS, zeros=SHARE)
def test_auto_is_dense_beside_rows_without_zeros(rows: int, others: int, zeros: float) -> None:
    """They read every weight anyway."""
    assert not router_of(FfnPath.AUTO).skips(rows, rows + others, zeros)


@settings(deadline=None)
@given(rows=st.integers(0, 300), zeros=SHARE)
@pytest.mark.parametrize("path", FfnPath)
@pytest.mark.parametrize("costs", [None, COSTS])
def test_without_relu_rows_nothing_is_skipped(path: FfnPath, costs: FfnCosts | None, rows: int, zeros: float) -> None:
    assert not router_of(path, costs).skips(0, rows, zeros)
