"""SIGTERM: what runs finishes, what is new is refused, and nobody waits for ever."""

import asyncio
import json
import signal
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import start_server

pytestmark = pytest.mark.slow


async def read_stream(http: httpx.AsyncClient, max_tokens: int, started: asyncio.Event) -> list[str]:
    """The events' data of a long stream."""
    request = {"prompt": "Once upon a time", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    events = []
    async with http.stream("POST", "/v1/completions", json=request) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                started.set()
    return events


async def test_running_streams_finish_and_new_requests_are_refused(tmp_path: Path) -> None:
    server = start_server(tmp_path / "log.txt", "--shutdown-timeout", "600")
    async with httpx.AsyncClient(base_url=server.url, timeout=None) as http:
        started = asyncio.Event()
        stream = asyncio.create_task(read_stream(http, 150, started))
        await started.wait()
        server.process.send_signal(signal.SIGTERM)
        while (await http.get("/health/ready")).status_code == 200:
            await asyncio.sleep(0.01)

        assert (await http.get("/health/live")).status_code == 200
        refused = await http.post("/v1/completions", json={"prompt": "Hi"})
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        events = await stream

    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait() == 0


async def test_streams_that_do_not_finish_in_time_end_with_an_error(tmp_path: Path) -> None:
    server = start_server(tmp_path / "log.txt", "--shutdown-timeout", "0.5")
    async with httpx.AsyncClient(base_url=server.url, timeout=None) as http:
        started = asyncio.Event()
        stream = asyncio.create_task(read_stream(http, 8000, started))
        await started.wait()
        server.process.send_signal(signal.SIGTERM)
        events = await stream

    assert json.loads(events[-1])["error"]["code"] == "engine_stopped"
    assert server.process.wait() == 0


async def test_a_port_in_use_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    server = start_server(tmp_path / "log.txt")
    port = server.url.rsplit(":", 1)[1]
    with pytest.raises(pytest.fail.Exception, match=f"cannot listen on .*:{port}"):
        start_server(tmp_path / "second.txt", "--port", port)
    assert server.stop() == 0
