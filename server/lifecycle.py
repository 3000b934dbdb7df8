"""Whether the server takes new requests, and how many it still has to finish."""


class Lifecycle:
    """The server's way from serving to gone: draining refuses what is new and lets what runs finish.

    Used from the event loop's thread only.
    """

    def __init__(self) -> None:
        self._draining = False
        self._active = 0

    @property
    def draining(self) -> bool:
        """Whether the server is on its way out."""
        return self._draining

    @property
    def active(self) -> int:
        """Generation requests that have begun and not ended."""
        return self._active

    def drain(self) -> None:
        """Take no new requests from now on."""
        self._draining = True

    def begin(self) -> None:
        """A generation request has begun."""
        self._active += 1

    def end(self) -> None:
        """A generation request has ended, however it did."""
        self._active -= 1
