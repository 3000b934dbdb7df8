"""The header `Retry-After`, in both of its forms."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from siluette_client.retry_after import parse_retry_after

NOW = datetime(2026, 11, 8, 8, 49, 37, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("120", 120),
        (" 7 ", 7),
        ("Sun, 08 Nov 2026 08:49:47 GMT", 10),
        ("Sunday, 08-Nov-26 08:49:47 GMT", 10),
        ("Sun Nov  8 08:49:47 2026", 10),
        ("Sun, 08 Nov 2026 08:49:47 -0000", 10),
        ("Sun, 08 Nov 2026 08:49:27 GMT", 0),
    ],
)
def test_seconds_and_the_three_forms_of_a_date(value: str, seconds: float) -> None:
    assert parse_retry_after(value, NOW) == seconds


@pytest.mark.parametrize("value", [None, "", "-1", "1.5", "soon", "١٢", "Sun, 99 Nov 2026 08:49:47 GMT", "1e3"])
def test_anything_else_counts_as_not_said(value: str | None) -> None:
    assert parse_retry_after(value, NOW) is None


def test_a_date_is_compared_with_the_clock() -> None:
    seconds = parse_retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True))

    assert seconds is not None
    assert 20 < seconds <= 30
