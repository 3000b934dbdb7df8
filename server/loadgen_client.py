"""A lean HTTP client for server-sent events: what the load generator measures with.

The client shares the processor with the server that it measures, so its own cost per token must be small: an
`asyncio.Protocol` with httptools' parser (C) and orjson takes a few microseconds for each event, where httpx takes more
than a hundred. Each request has a connection of its own; its clock starts when the connected socket is written to, so
what is measured includes the wait to be accepted, and not the TCP and TLS handshakes.
"""

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import orjson

MAX_BODY_BYTES = 16 * 1024 * 1024  # of an answer that is no stream


class RequestError(Exception):
    """A request without a complete answer.

    `kind` is one of `connect`, `timeout`, `disconnected`, `malformed`, `stream_error`, `no_answer`, `http_<status>`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts as the server reports them."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int


@dataclass(slots=True)
class StreamRecord:
    """What happened when. Times are of `time.perf_counter`.

    Attributes:
        piece_times: Arrival of each event that carried text.
        finished: Arrival of the end of the answer.
        usage: None if the server reports none.
    """

    started: float
    piece_times: list[float] = field(default_factory=list)
    finished: float = 0.0
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server is. `prefix` is what stands before `/v1` in its addresses.

    Attributes:
        authorization: Value of the Authorization header; none if empty.
    """

    host: str
    port: int
    prefix: str = ""
    tls: bool = False
    authorization: str = field(default="", repr=False)

    @classmethod
    def parse(cls, base_url: str, api_key: str | None = None) -> "Target":
        """Read `http://host:port`, with or without `/v1` at the end.

        Raises:
            ValueError: The text is no http or https address.
        """
        error = ValueError(f"the base URL must look like 'http://127.0.0.1:8000', got {base_url!r}")
        try:
            parts = urlsplit(base_url)
            port = parts.port
        except ValueError:
            raise error from None
        if parts.scheme not in ("http", "https") or not parts.hostname or not base_url.isascii() or " " in base_url:
            raise error
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        authorization = f"Bearer {api_key}" if api_key else ""
        if not (authorization.isascii() and authorization.isprintable()):
            raise ValueError("the API key must be printable ASCII")
        return cls(parts.hostname, port or (443 if tls else 80), prefix, tls, authorization)

    async def fetch(self, method: str, path: str, body: object = None, timeout: float = 60.0) -> Any:
        """Parsed JSON of an answer with status 200.

        Raises:
            RequestError: Anything else.
        """
        return (await self._exchange(method, path, body, timeout, None)).json()

    async def stream(self, path: str, body: object, timeout: float) -> StreamRecord:
        """Post a request for a stream and read it to its end.

        Raises:
            RequestError: There was no complete answer.
        """
        record = StreamRecord(0.0)
        await self._exchange("POST", path, body, timeout, record)
        return record

    async def _exchange(
        self, method: str, path: str, body: object, timeout: float, record: StreamRecord | None
    ) -> "_Exchange":
        request = self._request_bytes(method, path, body)
        exchange = _Exchange(record)
        try:
            async with asyncio.timeout(timeout):
                tls = ssl.create_default_context() if self.tls else None
                try:
                    transport, _ = await asyncio.get_running_loop().create_connection(
                        lambda: exchange, self.host, self.port, ssl=tls
                    )
                except OSError as error:
                    raise RequestError("connect", f"cannot connect to {self.host}:{self.port}: {error}") from error
                try:
                    if record is not None:
                        record.started = time.perf_counter()
                    transport.write(request)
                    await exchange.done
                finally:
                    transport.abort()
        except TimeoutError:
            raise RequestError("timeout", f"no complete answer within {timeout:g} s") from None
        return exchange

    def _request_bytes(self, method: str, path: str, body: object) -> bytes:
        content = b"" if body is None else orjson.dumps(body)
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"{method} {self.prefix}{path} HTTP/1.1",
            f"Host: {host}:{self.port}",
            "Connection: close",
            "Accept: */*",
        ]
        if self.authorization:
            lines.append(f"Authorization: {self.authorization}")
        if content:
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        return "\r\n".join([*lines, "\r\n"]).encode() + content


class _Exchange(asyncio.Protocol):
    """One request and its answer. The `on_...` methods are httptools' callbacks."""

    def __init__(self, record: StreamRecord | None) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._record = record
        self._status = 0
        self._streaming = False
        self._body = bytearray()
        self._rest = b""  # the beginning of a line whose end has not come yet
        self._complete = False
        self._finish_reason = False  # `transformers serve` ends its streams with one, and without [DONE]
        self._now = 0.0

    def json(self) -> Any:
        try:
            return orjson.loads(self._body)
        except orjson.JSONDecodeError as error:
            raise RequestError("malformed", f"the answer is no JSON: {error}") from error

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            # An exception in a callback arrives wrapped.
            cause = error.__context__ if isinstance(error.__context__, RequestError) else None
            self._fail(cause or RequestError("malformed", f"the answer is no HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._complete:
            self._succeed()
        self._fail(RequestError("disconnected", "the server closed the connection before the end of the answer"))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._streaming = self._status == 200 and self._record is not None

    def on_body(self, body: bytes) -> None:
        if not self._streaming:
            self._body += body
            if len(self._body) > MAX_BODY_BYTES:
                raise RequestError("malformed", f"the answer is longer than {MAX_BODY_BYTES} bytes")
            return
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._on_event(line[5:].strip())

    def on_message_complete(self) -> None:
        if self._status != 200:
            self._fail(RequestError(f"http_{self._status}", _error_message(bytes(self._body))))
        elif self._streaming and not (self._complete or self._finish_reason):
            self._fail(RequestError("disconnected", "the stream ended without finish_reason or [DONE]"))
        else:
            self._succeed()

    def _on_event(self, data: bytes) -> None:
        record = self._record
        assert record is not None
        if data == b"[DONE]":
            self._complete = True
            record.finished = self._now
            if not record.piece_times and record.usage is None:
                raise RequestError("no_answer", "the stream held neither text nor token counts")
            return
        try:
            event = orjson.loads(data)
            if "error" in event:
                raise RequestError("stream_error", _error_message(data))
            if usage := event.get("usage"):
                details = usage.get("prompt_tokens_details") or {}
                record.usage = Usage(
                    usage["prompt_tokens"], usage["completion_tokens"], details.get("cached_tokens") or 0
                )
            choices = event.get("choices") or ()
            if any(_has_text(choice) for choice in choices):
                record.piece_times.append(self._now)
            if any(choice.get("finish_reason") for choice in choices):
                self._finish_reason = True
                record.finished = self._now
        except (orjson.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
            raise RequestError("malformed", f"an event is not OpenAI's: {data[:200]!r}") from error

    def _succeed(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def _fail(self, error: RequestError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


def _has_text(choice: dict[str, Any]) -> bool:
    if "delta" in choice:
        delta = choice["delta"]
        return bool(delta.get("content") or delta.get("reasoning_content"))
    return bool(choice.get("text"))


def _error_message(body: bytes) -> str:
    """The message of an error answer in OpenAI's form, or the beginning of whatever else it is."""
    try:
        return str(orjson.loads(body)["error"]["message"])
    except (orjson.JSONDecodeError, TypeError, KeyError):
        return body[:300].decode("utf-8", "replace") or "no message"
