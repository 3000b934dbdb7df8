"""The header `Retry-After` (RFC 9110, 10.2.3): a number of seconds, or a date."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


def parse_retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds to wait, 0 or more; None without a value or for one that is neither form.

    Args:
        value: The header's value.
        now: What a date is compared with, with a time zone; the present if left out.
    """
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:  # "-0000": UTC, says RFC 5322, from a clock without a zone
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())
