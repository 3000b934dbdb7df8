"""Which failures are tried again, and when. Nothing here waits: the clients do."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from siluette_client.errors import APIError, ConnectionFailed, SiluetteError

RETRIED_STATUSES = frozenset({429, 502, 503, 504})
MAX_DOUBLINGS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Exponential back-off with jitter, for answers with status 429, 502, 503 or 504 and for failed connections.

    Nothing else is tried again: no time-out, no other error, and no stream whose answer has begun.

    Attributes:
        max_retries: Most attempts after the first, 0 or more.
        base_delay: Seconds before the first retry; each further one waits twice as long.
        max_delay: Most seconds of such a wait.
        max_retry_after: Most seconds that a server's `Retry-After` is obeyed; when it asks for more, the error is
            raised at once (and says so in `retry_after`).

    Raises:
        ValueError: A value is negative or no number.
    """

    max_retries: int = 2
    base_delay: float = 0.5
    max_delay: float = 8.0
    max_retry_after: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_retries", "base_delay", "max_delay", "max_retry_after"):
            value = getattr(self, name)
            if not value >= 0:  # a NaN is refused as well
                raise ValueError(f"{name} must be 0 or more, got {value!r}")

    def delay(self, error: SiluetteError, retries: int, draw: Callable[[], float] = random.random) -> float | None:
        """Seconds to wait before the next attempt; None if the error is to be raised.

        Args:
            error: Why the last attempt failed.
            retries: Retries so far.
            draw: Gives the jitter, in [0, 1).
        """
        if retries >= self.max_retries or not is_retryable(error):
            return None
        if isinstance(error, APIError) and error.retry_after is not None:
            if error.retry_after > self.max_retry_after:
                return None
            # Never earlier than asked; a little later, so that all who were told the same do not come back as one.
            return error.retry_after + self.base_delay * draw()
        longest = min(self.max_delay, self.base_delay * 2.0 ** min(retries, MAX_DOUBLINGS))
        return longest * (0.5 + 0.5 * draw())


NO_RETRIES = RetryPolicy(max_retries=0)


def is_retryable(error: SiluetteError) -> bool:
    """Whether the same request may succeed a little later, and was not begun to be answered."""
    if isinstance(error, APIError):
        return error.status in RETRIED_STATUSES
    return isinstance(error, ConnectionFailed)
