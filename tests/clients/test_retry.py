"""Which failures are tried again, and when."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siluette_client import (
    APIError,
    ConnectionFailed,
    InvalidAnswer,
    Overloaded,
    RequestTimeout,
    RetryPolicy,
    SiluetteError,
    StreamFailed,
    StreamInterrupted,
    TransportError,
)

DOWN = ConnectionFailed("refused")


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_statuses_that_pass_are_tried_again(status: int) -> None:
    assert RetryPolicy().delay(APIError("busy", status), 0) is not None


@pytest.mark.parametrize("status", [400, 401, 404, 408, 409, 413, 422, 500, 501])
def test_other_statuses_are_not(status: int) -> None:
    assert RetryPolicy().delay(APIError("no", status), 0) is None


@pytest.mark.parametrize(
    "error",
    [
        RequestTimeout("late"),
        StreamInterrupted("cut"),
        StreamFailed("engine died", code="engine_stopped"),
        TransportError("unsupported"),
        InvalidAnswer("html"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_nothing_else_is_tried_again(error: SiluetteError) -> None:
    assert RetryPolicy().delay(error, 0) is None


def test_the_wait_doubles_up_to_its_limit() -> None:
    policy = RetryPolicy(max_retries=2000, base_delay=0.5, max_delay=4)

    assert [policy.delay(DOWN, retries, draw=lambda: 1.0) for retries in range(5)] == [0.5, 1, 2, 4, 4]
    assert policy.delay(DOWN, 1999, draw=lambda: 1.0) == 4


@given(retries=st.integers(0, 9), draw=st.floats(0, 1, exclude_max=True))
def test_jitter_takes_at_most_half_of_the_wait(retries: int, draw: float) -> None:
    policy = RetryPolicy(max_retries=10)
    longest = policy.delay(DOWN, retries, draw=lambda: 1.0)
    delay = policy.delay(DOWN, retries, draw=lambda: draw)

    assert longest is not None
    assert delay is not None
    assert longest / 2 <= delay <= longest


def test_two_clients_that_fail_together_do_not_come_back_together() -> None:
    delays = {RetryPolicy().delay(DOWN, 0) for _ in range(20)}

    assert len(delays) > 1


@given(retry_after=st.floats(0, 60), draw=st.floats(0, 1, exclude_max=True))
def test_retry_after_is_obeyed_and_never_undercut(retry_after: float, draw: float) -> None:
    error = Overloaded("full", 429, retry_after=retry_after)
    delay = RetryPolicy(base_delay=0.5, max_delay=1).delay(error, 0, draw=lambda: draw)

    assert delay is not None
    assert retry_after <= delay <= retry_after + 0.5


def test_a_server_that_asks_for_too_long_a_wait_is_not_waited_for() -> None:
    assert RetryPolicy(max_retry_after=60).delay(Overloaded("full", 429, retry_after=61), 0) is None


def test_attempts_come_to_an_end() -> None:
    policy = RetryPolicy(max_retries=2)

    assert [policy.delay(DOWN, retries) is None for retries in range(4)] == [False, False, True, True]


@pytest.mark.parametrize("field", ["max_retries", "base_delay", "max_delay", "max_retry_after"])
@pytest.mark.parametrize("value", [-1, math.nan])
def test_a_policy_names_its_bad_value(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must be 0 or more"):
        RetryPolicy(**{field: value})  # type: ignore[arg-type]
