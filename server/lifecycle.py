"""Whether the server takes new requests, and how many it still has to finish."""


class Lifecycle:
    """The server's way from serving to gone.

    Serving, leaving (no longer ready, so that balancers look elsewhere, while what they still send is served), draining
    (what is new is refused, what runs finishes).

    Used from the event loop's thread only.
    """

    def __init__(self) -> None:
        self._leaving = False
        self._draining = False
        self._active = 0

    @property
    def leaving(self) -> bool:
        """Whether the server is on its way out: it is not ready, though it may still take requests."""
        return self._leaving

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return self._draining

    @property
    def active(self) -> int:
        """Generation requests that have begun and not ended."""
        return self._active

    def leave(self) -> None:
        """Be no longer ready."""
        self._leaving = True

    def drain(self) -> None:
        """Take no new requests from now on."""
        self._leaving = self._draining = True

    def begin(self) -> None:
        """A generation request has begun."""
        self._active += 1

    def end(self) -> None:
        """A generation request has ended, however it did."""
        self._active -= 1
