"""The load generator's HTTP client, against a server that says exactly what a test tells it to."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from server.loadgen_client import RequestError, Target, Usage

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(*parts: bytes) -> list[bytes]:
    return [b"%x\r\n%s\r\n" % (len(part), part) for part in parts] + [b"0\r\n\r\n"]


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(piece: str) -> bytes:
    return event(choices=[{"index": 0, "text": piece}])


USAGE = event(
    choices=[], usage={"prompt_tokens": 5, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
)
DONE = b"data: [DONE]\n\n"


@asynccontextmanager
async def scripted(*pieces: bytes, pause: float = 0.0, hang: bool = False) -> AsyncIterator[tuple[Target, list[bytes]]]:
    """A server that reads one request, says `pieces` and closes; with `hang`, it does not close."""
    requests: list[bytes] = []
    leave = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.read(65536))
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
        if hang:
            await leave.wait()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield Target("127.0.0.1", port, authorization="Bearer secret"), requests
    finally:
        leave.set()
        server.close()


class TestTarget:
    @pytest.mark.parametrize(
        ("url", "target"),
        [
            ("http://127.0.0.1:8000", Target("127.0.0.1", 8000)),
            ("http://localhost:8000/v1/", Target("localhost", 8000)),
            ("https://example.org/api/v1", Target("example.org", 443, "/api", tls=True)),
            ("http://[::1]:81", Target("::1", 81)),
        ],
    )
    def test_parses(self, url: str, target: Target) -> None:
        assert Target.parse(url) == target

    @pytest.mark.parametrize(
        "url", ["", "localhost:8000", "ftp://x", "http://", "http://x:99999", "http://x:y", "http://x y"]
    )
    def test_refuses(self, url: str) -> None:
        with pytest.raises(ValueError, match="the base URL must look like"):
            Target.parse(url)

    def test_does_not_show_the_api_key(self) -> None:
        target = Target.parse("http://x", "secret")
        assert target.authorization == "Bearer secret"
        assert "secret" not in repr(target)

    def test_refuses_an_api_key_that_could_forge_a_header(self) -> None:
        with pytest.raises(ValueError, match="API key"):
            Target.parse("http://x", "a\r\nX: y")


class TestRequest:
    async def test_is_well_formed(self) -> None:
        async with scripted(HEAD, *chunked(text("a"), DONE)) as (target, requests):
            await target.stream("/v1/completions", {"prompt": "é"}, 30)
        head, _, body = requests[0].partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        assert lines[0] == "POST /v1/completions HTTP/1.1"
        assert f"Host: 127.0.0.1:{target.port}" in lines
        assert "Authorization: Bearer secret" in lines
        assert f"Content-Length: {len(body)}" in lines
        assert json.loads(body) == {"prompt": "é"}

    async def test_fetch_returns_json(self) -> None:
        async with scripted(b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"a": 1}') as (target, requests):
            assert await target.fetch("GET", "/v1/models") == {"a": 1}
        assert requests[0].startswith(b"GET /v1/models HTTP/1.1\r\n")


class TestStream:
    async def test_times_each_piece_of_text_and_takes_the_usage(self) -> None:
        pieces = chunked(event(choices=[{"index": 0, "text": ""}]), text("a"), text("b"), USAGE, DONE)
        async with scripted(HEAD, *pieces, pause=0.02) as (target, _):
            record = await target.stream("/", {}, 30)
        assert len(record.piece_times) == 2
        assert record.started < record.piece_times[0] < record.piece_times[1] < record.finished
        assert record.usage == Usage(input_tokens=5, output_tokens=3, cached_tokens=2)

    async def test_knows_the_chat_form(self) -> None:
        deltas = [{"role": "assistant", "content": ""}, {"content": "a"}, {"reasoning_content": "b"}, {}]
        events = [event(choices=[{"index": 0, "delta": delta}]) for delta in deltas]
        async with scripted(HEAD, *chunked(*events, DONE)) as (target, _):
            assert len((await target.stream("/", {}, 30)).piece_times) == 2

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
    async def test_events_may_be_cut_anywhere(self, size: int) -> None:
        body = b": comment\r\n\r\n" + text("a").replace(b"\n", b"\r\n") + text("b") + USAGE + DONE
        cut = chunked(*(body[start : start + size] for start in range(0, len(body), size)))
        async with scripted(HEAD, *cut) as (target, _):
            record = await target.stream("/", {}, 30)
        assert len(record.piece_times) == 2
        assert record.usage is not None

    async def test_end_of_connection_may_be_the_end_of_the_answer(self) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
        async with scripted(head, text("a"), DONE) as (target, _):
            assert len((await target.stream("/", {}, 30)).piece_times) == 1

    async def test_finish_reason_and_a_proper_end_will_do_without_done(self) -> None:
        last = event(choices=[{"index": 0, "text": "", "finish_reason": "length"}])
        async with scripted(HEAD, *chunked(text("a"), last), pause=0.02) as (target, _):
            record = await target.stream("/", {}, 30)
        assert record.piece_times[0] < record.finished
        with pytest.raises(RequestError) as caught:
            async with scripted(HEAD, *chunked(text("a"), last)[:-1]) as (target, _):
                await target.stream("/", {}, 30)
        assert caught.value.kind == "disconnected"


class TestErrors:
    @pytest.mark.parametrize(
        ("pieces", "kind", "message"),
        [
            ([], "disconnected", "closed the connection"),
            ([HEAD, *chunked(text("a"), DONE)[:1]], "disconnected", "closed the connection"),
            ([HEAD, *chunked(text("a"))], "disconnected", r"without finish_reason or \[DONE\]"),
            ([HEAD, *chunked(event(error={"message": "the engine died"}), DONE)], "stream_error", "the engine died"),
            ([HEAD, *chunked(b"data: {oops\n\n")], "malformed", "not OpenAI's"),
            ([HEAD, *chunked(b"data: [1]\n\n")], "malformed", "not OpenAI's"),
            ([HEAD, *chunked(event(choices=[], usage={"tokens": 3}))], "malformed", "not OpenAI's"),
            ([HEAD, *chunked(DONE)], "no_answer", "neither text nor token counts"),
            ([b"garbage\r\n\r\n"], "malformed", "no HTTP"),
            (
                [b'HTTP/1.1 429 x\r\nContent-Length: 31\r\n\r\n{"error": {"message": "full" }}'],
                "http_429",
                "full",
            ),
            ([b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 5\r\n\r\noops!"], "http_502", "oops!"),
            ([b"HTTP/1.1 503 x\r\nContent-Length: 0\r\n\r\n"], "http_503", "no message"),
        ],
    )
    async def test_have_a_kind_and_a_message(self, pieces: list[bytes], kind: str, message: str) -> None:
        async with scripted(*pieces) as (target, _):
            with pytest.raises(RequestError, match=message) as caught:
                await target.stream("/", {}, 30)
        assert caught.value.kind == kind

    async def test_silence_is_a_timeout(self) -> None:
        async with scripted(HEAD, *chunked(text("a"))[:1], hang=True) as (target, _):
            with pytest.raises(RequestError) as caught:
                await target.stream("/", {}, 0.05)
        assert caught.value.kind == "timeout"

    async def test_closed_port_is_no_connection(self) -> None:
        async with scripted() as (target, _):
            pass
        with pytest.raises(RequestError) as caught:
            await target.stream("/", {}, 30)
        assert caught.value.kind == "connect"
