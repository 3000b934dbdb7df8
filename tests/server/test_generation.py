"""What happens to a generation when the client leaves, the queue is full or the engine stops."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.types import Message, Scope

from engine import AsyncEngine
from server.app import create_app
from server.settings import ServerSettings
from tests.server.conftest import client_of, tiny_config
from tests.server.helpers import error_of

LONG = {"prompt": "x", "max_tokens": 200, "ignore_eos": True}


class Visitor:
    """A client on the bare ASGI interface, where it can leave at a chosen moment."""

    def __init__(self, app: FastAPI, body: dict[str, Any]) -> None:
        self.messages: list[Message] = []
        self.prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        self._app = app
        self._received: asyncio.Queue[Message] = asyncio.Queue()
        self._received.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        self._first_body = asyncio.Event()

    async def run(self) -> None:
        scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        await self._app(scope, self._received.get, self._send)

    async def first_body(self) -> None:
        await self._first_body.wait()

    def leave(self) -> None:
        self._received.put_nowait({"type": "http.disconnect"})

    async def _send(self, message: Message) -> None:
        self.messages.append(message)
        if message["type"] == "http.response.body":
            self._first_body.set()


async def until_aborted(engine: AsyncEngine, count: int) -> None:
    """Until the engine has aborted so many requests since its start and is idle."""
    while engine.stats().aborted < count:
        await asyncio.sleep(0.01)
    await until_idle(engine)


async def until_idle(engine: AsyncEngine) -> None:
    """Until the engine has nothing left: the test would hang if something were never freed."""
    while (stats := engine.stats()).running or stats.waiting or stats.kv_blocks_used:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("prompt", ["x", ["x", "y", "z"]])
async def test_a_client_that_leaves_a_stream_frees_everything(
    app: FastAPI, engine: AsyncEngine, prompt: str | list[str]
) -> None:
    aborted = engine.stats().aborted
    visitor = Visitor(app, {**LONG, "prompt": prompt, "n": 2, "stream": True})
    task = asyncio.create_task(visitor.run())
    await visitor.first_body()
    visitor.leave()
    await task

    await until_aborted(engine, aborted + len(visitor.prompts))
    sent = b"".join(message.get("body", b"") for message in visitor.messages)
    assert b'"finish_reason":"length"' not in sent
    assert app.state.services.lifecycle.active == 0


async def test_a_client_that_leaves_before_the_whole_answer_frees_everything(app: FastAPI, engine: AsyncEngine) -> None:
    aborted = engine.stats().aborted
    visitor = Visitor(app, {**LONG, "n": 8})
    task = asyncio.create_task(visitor.run())
    while not app.state.services.lifecycle.active:
        await asyncio.sleep(0)
    visitor.leave()
    await task

    await until_aborted(engine, aborted + len(visitor.prompts))


async def test_a_full_queue_is_429_and_leaves_nothing_behind(tiny_model: Path) -> None:
    engine = AsyncEngine(tiny_config(tiny_model, max_num_seqs=1, max_waiting=20))
    app = create_app(engine, ServerSettings())
    async with app.router.lifespan_context(app), client_of(app) as client:
        waiting = asyncio.create_task(client.post("/v1/completions", json={**LONG, "prompt": ["x"] * 10}))
        while engine.stats().waiting == 0:
            await asyncio.sleep(0.001)
        response = await client.post("/v1/completions", json={**LONG, "prompt": ["x"] * 20})
        error = error_of(response, 429)
        assert error["code"] == "engine_overloaded"
        assert int(response.headers["retry-after"]) >= 1
        assert (await client.get("/health/ready")).status_code == 200

        assert (await waiting).status_code == 200
        await until_idle(engine)
        assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200


async def test_a_stopped_engine_is_503(tiny_model: Path) -> None:
    engine = AsyncEngine(tiny_config(tiny_model))
    app = create_app(engine, ServerSettings())
    async with client_of(app) as client:
        async with app.router.lifespan_context(app):
            assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200
        error = error_of(await client.post("/v1/completions", json={"prompt": "x"}), 503)
        assert error["code"] == "engine_stopped"
        assert (await client.get("/health/live")).status_code == 503
        assert (await client.get("/health/ready")).json() == {"status": "stopped"}


async def test_an_engine_that_stops_ends_a_stream_with_an_error_event(tiny_model: Path) -> None:
    engine = AsyncEngine(tiny_config(tiny_model))
    app = create_app(engine, ServerSettings())
    async with app.router.lifespan_context(app):
        visitor = Visitor(app, {**LONG, "n": 4, "stream": True})
        task = asyncio.create_task(visitor.run())
        await visitor.first_body()
        await asyncio.to_thread(engine.shutdown)
        await task

    *_, last_event, end = [message["body"] for message in visitor.messages[1:]]
    assert end == b""
    assert json.loads(last_event.removeprefix(b"data: "))["error"]["code"] == "engine_stopped"
    assert not any(b"[DONE]" in message["body"] for message in visitor.messages[1:])


async def test_a_draining_server_refuses_what_is_new_and_stays_alive(app: FastAPI) -> None:
    async with client_of(app) as client:
        app.state.services.lifecycle.drain()

        assert "shutting down" in error_of(await client.post("/v1/completions", json=LONG), 503)["message"]
        assert (await client.get("/health/ready")).status_code == 503
        assert (await client.get("/health/live")).json() == {"status": "draining"}


async def test_a_leaving_server_serves_and_ends_connections_with_the_answer(app: FastAPI) -> None:
    async with client_of(app) as client:
        kept = await client.get("/version")
        app.state.services.lifecycle.leave()
        answer = await client.post("/v1/completions", json={"prompt": [1, 2], "max_tokens": 2})

        assert "connection" not in kept.headers
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"
        assert (await client.get("/health/ready")).status_code == 503


async def test_the_event_loop_stays_free_while_the_engine_works(app: FastAPI) -> None:
    """Other requests are answered in the middle of long ones."""
    async with client_of(app) as client:
        long = asyncio.create_task(client.post("/v1/completions", json={**LONG, "n": 8}))
        answered = 0
        while not long.done():
            assert (await client.get("/health/live")).status_code == 200
            answered += 1
            await asyncio.sleep(0.001)  # the in-process client itself never waits, and would not let the engine work
        assert (await long).status_code == 200
        assert answered > 10


async def test_more_sequences_than_may_ever_wait_are_a_400_and_not_a_429(tiny_model: Path) -> None:
    engine = AsyncEngine(tiny_config(tiny_model, max_waiting=8))
    engine.start()
    try:
        async with client_of(create_app(engine, ServerSettings())) as client:
            answer = await client.post("/v1/completions", json={"prompt": ["a", "b", "c"], "n": 3})
    finally:
        engine.shutdown()

    assert error_of(answer, 400)["param"] == "n"
