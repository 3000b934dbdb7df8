"""Streamed answers: an iterator over pieces of text that closes its connection when it is left."""

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import TracebackType
from typing import Self

import httpx

from siluette_client.answers import StreamReader
from siluette_client.errors import InvalidAnswer, RequestTimeout, SiluetteError, StreamInterrupted, error_of_transport
from siluette_client.types import Chunk, Completion

EVENT_STREAM = "text/event-stream"


class _StreamState:
    """What both kinds of stream know; nothing here does input or output."""

    def __init__(self) -> None:
        self._reader = StreamReader()
        self._ready: deque[Chunk] = deque()
        self._closed = False

    @property
    def completion(self) -> Completion:
        """What has arrived so far, as one answer; after the last piece that is the whole answer, with its `usage`.

        Raises:
            InvalidAnswer: Nothing has arrived yet.
        """
        return self._reader.completion

    def _take_bytes(self, data: bytes) -> None:
        self._ready.extend(self._reader.feed(data))

    def _take_error(self, error: httpx.HTTPError) -> None:
        """The connection failed. After the end of the answer that is of no interest."""
        if self._reader.done or self._reader.failure is not None:
            return
        failure = error_of_transport(error)
        if not isinstance(failure, RequestTimeout | InvalidAnswer):
            failure = StreamInterrupted(f"the connection failed in the middle of the stream: {error or repr(error)}")
        failure.__cause__ = error
        self._reader.failure = failure

    def _take_failure(self) -> SiluetteError | None:
        """The reason why the stream is broken, once."""
        failure, self._reader.failure = self._reader.failure, None
        return failure


def check_event_stream(response: httpx.Response) -> None:
    """Refuse an answer that is no stream of events.

    Raises:
        InvalidAnswer: It is something else, such as a proxy's page.
    """
    kind = response.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != EVENT_STREAM:
        raise InvalidAnswer(f"the answer must be of type {EVENT_STREAM}, got {kind!r}")


class Stream(_StreamState):
    """Pieces of a streamed answer.

    The request is sent on entering the `with` block, or with the first piece. Leaving the block or calling `close`
    before the end closes the connection, at which the server frees the request. Not to be shared between threads.

    ```
    with client.stream("Once upon a time", max_tokens=100) as stream:
        for chunk in stream:
            print(chunk.text, end="", flush=True)
    print(stream.completion.seed)
    ```

    Iterating raises `StreamFailed` for an error that the server reports in mid-stream, `StreamInterrupted` when the
    connection ends before the answer, and `RequestTimeout`.
    """

    def __init__(self, send: Callable[[], httpx.Response]) -> None:
        super().__init__()
        self._send = send
        self._response: httpx.Response | None = None
        self._bytes: Iterator[bytes] = iter(())

    def __enter__(self) -> Self:
        """Send the request.

        Raises:
            APIError: The server refuses it.
            TransportError: There is no answer.
            InvalidAnswer: The answer is no stream of events.
        """
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        while not self._ready:
            if self._closed:
                raise StopIteration
            self._fill()
        return self._ready.popleft()

    def read(self) -> Completion:
        """Read to the end; the whole answer."""
        with self:
            for _ in self:
                pass
        return self.completion

    def close(self) -> None:
        """Close the connection. What has arrived stays in `completion`; there are no more pieces."""
        self._closed = True
        self._ready.clear()
        if self._response is not None:
            self._response.close()

    def _open(self) -> None:
        if self._response is not None or self._closed:
            return
        self._response = self._send()
        self._bytes = self._response.iter_bytes()
        try:
            check_event_stream(self._response)
        except InvalidAnswer:
            self.close()
            raise

    def _fill(self) -> None:
        """Take what arrives next; at the end, close."""
        failure = self._take_failure()
        if failure is not None:
            self.close()
            raise failure
        self._open()
        try:
            data = next(self._bytes, None)
        except httpx.HTTPError as error:
            self._take_error(error)
            data = None
        except BaseException:  # Ctrl-C, say
            self.close()
            raise
        if data is not None:
            self._take_bytes(data)
            return
        self._reader.end()
        if self._reader.done:
            self.close()


class AsyncStream(_StreamState):
    """Pieces of a streamed answer, for asyncio.

    The request is sent on entering the `async with` block, or with the first piece. Leaving the block, calling
    `aclose` or cancelling the task closes the connection, at which the server frees the request.

    ```
    async with client.stream("Once upon a time", max_tokens=100) as stream:
        async for chunk in stream:
            print(chunk.text, end="", flush=True)
    print(stream.completion.seed)
    ```

    Iterating raises what `Stream` raises.
    """

    def __init__(self, send: Callable[[], Awaitable[httpx.Response]]) -> None:
        super().__init__()
        self._send = send
        self._response: httpx.Response | None = None
        self._bytes: AsyncIterator[bytes] | None = None

    async def __aenter__(self) -> Self:
        """Send the request; raises what `Stream` does."""
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while not self._ready:
            if self._closed:
                raise StopAsyncIteration
            await self._fill()
        return self._ready.popleft()

    async def read(self) -> Completion:
        """Read to the end; the whole answer."""
        async with self:
            async for _ in self:
                pass
        return self.completion

    async def aclose(self) -> None:
        """Close the connection. What has arrived stays in `completion`; there are no more pieces."""
        self._closed = True
        self._ready.clear()
        if self._response is not None:
            await self._response.aclose()

    async def _open(self) -> AsyncIterator[bytes]:
        if self._bytes is None:
            self._response = await self._send()
            self._bytes = self._response.aiter_bytes()
            try:
                check_event_stream(self._response)
            except InvalidAnswer:
                await self.aclose()
                raise
        return self._bytes

    async def _fill(self) -> None:
        """Take what arrives next; at the end, close."""
        failure = self._take_failure()
        if failure is not None:
            await self.aclose()
            raise failure
        arriving = await self._open()
        try:
            data = await anext(arriving, None)
        except httpx.HTTPError as error:
            self._take_error(error)
            data = None
        except BaseException:  # the task is cancelled, say
            await self.aclose()
            raise
        if data is not None:
            self._take_bytes(data)
            return
        self._reader.end()
        if self._reader.done:
            await self.aclose()
