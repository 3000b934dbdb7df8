"""What goes wrong between a client and a real server: full queues, lost connections, killed servers."""

import asyncio
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from siluette_client import (
    AsyncClient,
    Client,
    Completion,
    ConnectionFailed,
    Overloaded,
    RequestTimeout,
    RetryPolicy,
    StreamFailed,
    StreamInterrupted,
    Unavailable,
)
from tests.clients.conftest import PROMPT, Metrics, relay_to, untouched
from tests.e2e.conftest import ServerProcess, start_server

pytestmark = pytest.mark.slow

LONG: dict[str, Any] = {"max_tokens": 4000, "ignore_eos": True}


def test_a_full_queue_is_waited_for_as_long_as_the_server_asks(narrow_server: ServerProcess) -> None:
    metrics = Metrics(narrow_server.url)
    answers: list[Completion] = []
    with (
        Client(narrow_server.url, timeout=None, retry=None) as impatient,
        Client(narrow_server.url, timeout=None, retry=RetryPolicy(max_retries=100, base_delay=0.1)) as patient,
    ):
        running = impatient.stream(PROMPT, **LONG)
        next(running)
        waiting = threading.Thread(target=lambda: answers.append(patient.generate(PROMPT, max_tokens=2)))
        waiting.start()
        metrics.wait_until(lambda now: now.waiting == 1)

        with pytest.raises(Overloaded) as caught:
            impatient.generate(PROMPT, max_tokens=2)
        assert (caught.value.status, caught.value.code) == (429, "engine_overloaded")
        assert caught.value.retry_after == 1

        refused = metrics.refused
        retrying = threading.Thread(target=lambda: answers.append(patient.generate(PROMPT, max_tokens=3)))
        begun = time.monotonic()
        retrying.start()
        metrics.wait_until(lambda now: now.refused == refused + 1)
        running.close()
        waiting.join()
        retrying.join()
        waited = time.monotonic() - begun

    assert sorted(answer.usage.completion_tokens for answer in answers if answer.usage) == [2, 3]
    assert waited >= 1


async def test_the_asyncio_client_waits_too(narrow_server: ServerProcess) -> None:
    metrics = Metrics(narrow_server.url)
    async with AsyncClient(narrow_server.url, timeout=None, retry=RetryPolicy(max_retries=100)) as client:
        async with client.stream(PROMPT, **LONG) as running:
            await anext(running)
            waiting = asyncio.create_task(client.generate(PROMPT, max_tokens=2))
            await asyncio.to_thread(metrics.wait_until, lambda now: now.waiting == 1)
            refused = metrics.refused
            retrying = asyncio.create_task(client.stream(PROMPT, max_tokens=3).read())
            await asyncio.to_thread(metrics.wait_until, lambda now: now.refused > refused)
        answers = await asyncio.gather(waiting, retrying)

    assert [answer.usage.completion_tokens for answer in answers if answer.usage] == [2, 3]


@pytest.mark.parametrize("killed", [Client, AsyncClient])
async def test_a_server_that_is_killed_in_mid_stream_is_an_error(tmp_path: Path, killed: type) -> None:
    server = start_server(tmp_path / "log.txt", "--kv-cache-mib", "256")
    try:
        if killed is Client:
            await asyncio.to_thread(read_until_killed, server)
        else:
            async with AsyncClient(server.url, timeout=None) as client, client.stream(PROMPT, **LONG) as stream:
                first = (await anext(stream)).text
                server.process.kill()
                with pytest.raises(StreamInterrupted):
                    await stream.read()
                assert stream.completion.text.startswith(first)
                assert [chunk async for chunk in stream] == []
                with pytest.raises(ConnectionFailed):
                    await client.models()
    finally:
        server.process.kill()
        server.process.wait()


def read_until_killed(server: ServerProcess) -> None:
    with Client(server.url, timeout=None) as client, client.stream(PROMPT, **LONG) as stream:
        texts = [next(stream).text]
        server.process.kill()
        with pytest.raises(StreamInterrupted):
            texts.extend(chunk.text for chunk in stream)
        assert stream.completion.text == "".join(texts)
        assert list(stream) == []
        with pytest.raises(ConnectionFailed):
            client.models()


async def test_an_error_event_in_mid_stream_is_raised(tmp_path: Path) -> None:
    server = start_server(tmp_path / "log.txt", "--kv-cache-mib", "256", "--shutdown-timeout", "0.5")
    async with AsyncClient(server.url, timeout=None) as client, client.stream(PROMPT, **LONG) as stream:
        await anext(stream)
        server.process.terminate()
        with pytest.raises(StreamFailed) as caught:
            async for _ in stream:
                pass

    assert (caught.value.status, caught.value.code) == (None, "engine_stopped")
    assert caught.value.request_id == stream.completion.id
    assert await asyncio.to_thread(server.process.wait) == 0


async def test_connections_that_fail_before_an_answer_are_tried_again(server: ServerProcess) -> None:
    async def fail_twice(number: int, answer: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        if number >= 2:
            await untouched(number, answer, client)

    retry = RetryPolicy(max_retries=2, base_delay=0.01)
    async with relay_to(server.url, fail_twice) as relay, AsyncClient(relay.url, timeout=None, retry=retry) as client:
        assert (await client.models())[0].id == server.model
    assert len(relay.requests) == 3

    retry = RetryPolicy(max_retries=1, base_delay=0.01)
    async with relay_to(server.url, fail_twice) as relay, AsyncClient(relay.url, timeout=None, retry=retry) as client:
        with pytest.raises(ConnectionFailed):
            await client.models()
    assert len(relay.requests) == 2


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_a_stream_is_not_tried_again_after_its_first_byte(server: ServerProcess, kind: type) -> None:
    async def cut_after_an_event(number: int, answer: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        client.write(await answer.readuntil(b"\r\n\r\n"))
        client.write(await answer.readuntil(b"\n\n"))
        await client.drain()

    async with relay_to(server.url, cut_after_an_event) as relay:
        if kind is AsyncClient:
            async with AsyncClient(relay.url, timeout=None, retry=RetryPolicy(max_retries=5)) as client:
                with pytest.raises(StreamInterrupted):
                    await client.stream(PROMPT, **LONG).read()
        else:
            with (
                Client(relay.url, timeout=None, retry=RetryPolicy(max_retries=5)) as client,
                pytest.raises(StreamInterrupted),
            ):
                await asyncio.to_thread(client.stream(PROMPT, **LONG).read)

    assert len(relay.requests) == 1


async def test_a_stream_that_stalls_times_out(server: ServerProcess, metrics: Metrics) -> None:
    async def stall(number: int, answer: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        client.write(await answer.readuntil(b"\r\n\r\n"))
        client.write(await answer.readuntil(b"\n\n"))
        await client.drain()
        while await answer.read(65536):
            pass

    async with (
        relay_to(server.url, stall) as relay,
        AsyncClient(relay.url, timeout=None) as client,
        client.stream(PROMPT, max_tokens=20, ignore_eos=True, timeout=5) as stream,
    ):
        await anext(stream)
        with pytest.raises(RequestTimeout):
            await anext(stream)

    assert len(relay.requests) == 1
    await asyncio.to_thread(metrics.wait_until, lambda now: now.running == 0)


async def test_a_proxy_without_its_server_is_waited_for_until_the_date_that_it_names(server: ServerProcess) -> None:
    dates: list[datetime] = []

    async def unavailable_once(number: int, answer: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        if number:
            await untouched(number, answer, client)
        else:
            dates.append(datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=3))
            head = f"HTTP/1.1 503 Service Unavailable\r\nRetry-After: {format_datetime(dates[0], usegmt=True)}\r\n"
            client.write(f"{head}Content-Length: 6\r\nConnection: close\r\n\r\n<html>".encode())
        await client.drain()

    async with relay_to(server.url, unavailable_once) as relay:
        async with AsyncClient(relay.url, timeout=None) as client:
            assert (await client.models())[0].id == server.model
        assert len(relay.requests) == 2
        assert datetime.now(UTC) >= dates[0]

    async with relay_to(server.url, unavailable_once) as relay, AsyncClient(relay.url, retry=None) as client:
        with pytest.raises(Unavailable, match=r"<html> \(status 503\)") as caught:
            await client.models()
    assert caught.value.retry_after is not None


async def test_headers_of_client_and_call_are_sent(server: ServerProcess) -> None:
    async with relay_to(server.url) as relay:
        headers = {"X-Team": "moon"}
        async with AsyncClient(relay.url, api_key="secret", headers=headers, timeout=None) as client:
            await client.models(headers={"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"})

    request = relay.requests[0].lower()
    for line in (b"authorization: bearer secret", b"x-team: moon", b"traceparent: 00-0af", b"user-agent: siluette-cli"):
        assert line in request


def test_nobody_listens() -> None:
    with Client("http://127.0.0.1:1", retry=None) as client, pytest.raises(ConnectionFailed, match="ConnectError"):
        client.models()
