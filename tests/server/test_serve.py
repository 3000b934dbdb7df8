"""How the server leaves: the first signal drains, the second one skips the wait."""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvicorn

from engine import AsyncEngine, EngineConfig
from server.app import create_app
from server.serve import DrainingServer, serve
from server.services import Services
from server.settings import ServerSettings
from tests.server.conftest import tiny_config


class Leaving:
    """A server whose signals and ticks a test gives by hand."""

    def __init__(self, services: Services, server: DrainingServer) -> None:
        self.services = services
        self._server = server

    def signal(self) -> None:
        self._server.handle_exit(signal.SIGTERM, None)

    async def ends(self) -> bool:
        return await self._server.on_tick(1)


@pytest.fixture(params=[{"shutdown_timeout": 600.0}])
async def leaving(tiny_model: Path, request: pytest.FixtureRequest) -> AsyncIterator[Leaving]:
    engine = AsyncEngine(tiny_config(tiny_model))
    app = create_app(engine, ServerSettings(**request.param))
    async with app.router.lifespan_context(app):
        services: Services = app.state.services
        yield Leaving(services, DrainingServer(uvicorn.Config(app), services, lambda: None))


async def test_without_a_signal_it_goes_on(leaving: Leaving) -> None:
    assert not await leaving.ends()
    assert leaving.services.engine.alive


async def test_an_idle_server_ends_at_once(leaving: Leaving) -> None:
    leaving.signal()

    assert leaving.services.lifecycle.draining
    assert await leaving.ends()
    assert not leaving.services.engine.alive


async def test_a_busy_server_waits_for_what_runs(leaving: Leaving) -> None:
    leaving.services.lifecycle.begin()
    leaving.signal()
    assert not await leaving.ends()
    assert leaving.services.engine.alive

    leaving.services.lifecycle.end()
    assert await leaving.ends()


async def test_a_second_signal_skips_the_wait(leaving: Leaving) -> None:
    leaving.services.lifecycle.begin()
    leaving.signal()
    leaving.signal()

    assert await leaving.ends()
    assert not leaving.services.engine.alive


@pytest.mark.parametrize("leaving", [{"drain_delay": 600.0}], indirect=True)
async def test_during_the_drain_delay_it_is_not_ready_and_takes_requests(leaving: Leaving) -> None:
    leaving.signal()

    assert not await leaving.ends()
    assert leaving.services.lifecycle.leaving
    assert not leaving.services.lifecycle.draining


@pytest.mark.parametrize("leaving", [{"drain_delay": 0.05, "shutdown_timeout": 600.0}], indirect=True)
async def test_after_the_drain_delay_it_refuses_and_waits_for_what_runs(leaving: Leaving) -> None:
    leaving.services.lifecycle.begin()
    leaving.signal()
    await asyncio.sleep(0.1)

    assert not await leaving.ends()
    assert leaving.services.lifecycle.draining
    leaving.services.lifecycle.end()
    assert await leaving.ends()


@pytest.mark.parametrize("leaving", [{"drain_delay": 600.0}], indirect=True)
async def test_a_second_signal_skips_the_drain_delay(leaving: Leaving) -> None:
    leaving.signal()
    leaving.signal()

    assert await leaving.ends()


@pytest.mark.parametrize("leaving", [{"shutdown_timeout": 0.0}], indirect=True)
async def test_the_timeout_ends_the_wait(leaving: Leaving) -> None:
    leaving.services.lifecycle.begin()
    leaving.signal()

    assert await leaving.ends()
    assert not leaving.services.engine.alive


def test_an_address_in_use_is_named_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve(EngineConfig(model="/no/such/model"), ServerSettings(port=port))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_server_that_still_loads(number: signal.Signals) -> None:
    command = [sys.executable, "-u", "-c", "from server.cli import app; app()", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("Loading"))
        process.send_signal(number)
        rest = process.stdout.read()
    assert process.returncode == 128 + number, rest
