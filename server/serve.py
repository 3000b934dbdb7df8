"""Run the server: load the engine, listen, and leave in good order."""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from prometheus_client import disable_created_metrics

from engine import AsyncEngine, EngineConfig
from server.app import create_app
from server.services import Services
from server.settings import ServerSettings
from server.tracing_setup import create_tracer

logger = logging.getLogger(__name__)

SLOW_CLIENT_SECONDS = 5  # for clients that do not read the end of their answers
BACKLOG = 2048


def serve(engine_config: EngineConfig, settings: ServerSettings, progress: Callable[[str], None] = print) -> None:
    """Load the engine and serve until SIGTERM or SIGINT.

    Args:
        engine_config: What to load.
        settings: How to serve it.
        progress: Takes a line for each long step.

    Raises:
        OSError: The address cannot be listened on.
        ModelLoadError: The model cannot be loaded.
        InvalidConfig: Options do not fit the model, or traces are asked for without the extra `otel`.
    """
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for every counter, which nobody reads
    listener = _bind(settings.host, settings.port)  # first: a port in use should not cost the time of a load
    tracer = create_tracer(settings)  # likewise: a missing package
    # The first process of a container has no default handlers: without one of its own it could not be stopped while it
    # loads. uvicorn sets its own later.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    engine = AsyncEngine(engine_config, progress=progress)
    app = create_app(engine, settings, tracer)
    config = uvicorn.Config(
        app,
        loop="auto",
        http="httptools",
        ws="none",
        log_config=None,  # one configuration for all loggers, above
        log_level=settings.log_level,
        access_log=settings.access_log,
        backlog=BACKLOG,
        timeout_graceful_shutdown=SLOW_CLIENT_SECONDS,
    )
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    services: Services = app.state.services
    server = DrainingServer(config, services, lambda: progress(f"Serving {services.model_name} at {address}"))
    server.run(sockets=[listener])


def _leave(number: int, frame: FrameType | None) -> None:
    """End a process that still loads: at once, for Python's exit would stop threads inside PyTorch, which aborts."""
    os._exit(128 + number)


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: clients are refused, and try again, until the model is there."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


class DrainingServer(uvicorn.Server):
    """uvicorn, except that the first signal drains.

    uvicorn alone closes its port at once. Here the port stays open while running requests finish, and probes see "not
    ready" and "alive". During the drain delay new requests are still served; then they get a 503 that says why. At the
    timeout the engine is shut down, which ends the streams that still run with an error event. A second signal skips
    all waiting.

    Args:
        config: uvicorn's own.
        services: Of the application that is served.
        on_started: Called when clients can connect.
    """

    def __init__(self, config: uvicorn.Config, services: Services, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._services = services
        self._on_started = on_started
        self._signalled: float | None = None  # when, on the monotonic clock

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application and listen."""
        await super().startup(sockets)
        self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal."""
        if self._signalled is None:
            self._signalled = time.monotonic()
            self._services.lifecycle.leave()
            if not self._services.settings.drain_delay:  # at once, not at the next tick
                self._services.lifecycle.drain()
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; true ends the server."""
        if self._signalled is not None:
            lifecycle, settings = self._services.lifecycle, self._services.settings
            waited = time.monotonic() - self._signalled - settings.drain_delay
            if waited < 0 and not self.should_exit:
                return await super().on_tick(counter)
            lifecycle.drain()
            active = lifecycle.active
            # Tasks, too: a request whose prompt is still being read or encoded is not active yet.
            busy = active or self.server_state.tasks
            expired = self.should_exit or waited >= settings.shutdown_timeout
            if expired and active:
                logger.warning("aborting %d requests that did not finish in time", active)
            if expired or not busy:
                await asyncio.to_thread(self._services.engine.shutdown)
                return True
        return await super().on_tick(counter)
