"""The FastAPI application around one engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from engine import AsyncEngine
from server import chat, completions, health, models, tokenize
from server.documentation import DESCRIPTION
from server.errors import install_handlers
from server.middleware import CloseWhileLeaving, CountRequests, LimitBody
from server.services import Services
from server.settings import ServerSettings
from server.version import VERSION

if TYPE_CHECKING:
    from server.tracing import RequestTracer  # needs an extra


def create_app(engine: AsyncEngine, settings: ServerSettings, tracer: "RequestTracer | None" = None) -> FastAPI:
    """The application for an engine that is loaded and not started: its lifespan starts it and shuts it down.

    `app.state.services` holds what the routes share.

    Args:
        engine: Answers the requests.
        settings: How to serve them.
        tracer: Traces them, if at all; the lifespan shuts it down.
    """
    services = Services.create(engine, settings, tracer)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(engine.shutdown)
            if tracer is not None:
                await asyncio.to_thread(tracer.shutdown)

    app = FastAPI(title="Siluette", version=VERSION, description=DESCRIPTION, lifespan=lifespan)
    app.state.services = services
    for module in (completions, chat, models, tokenize, health):
        app.include_router(module.router)
    install_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(LimitBody, max_bytes=settings.max_body_bytes)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(CloseWhileLeaving, lifecycle=services.lifecycle)
    app.add_middleware(CountRequests, metrics=services.metrics)
    return app
