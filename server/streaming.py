"""Streamed answers: server-sent events, written at a few microseconds each.

A busy server sends thousands of events a second on the cores that also decode. So what is the same in every event of an
answer is serialised once, the rest is one `orjson` call on a small dict, and the response talks ASGI itself.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager

import orjson
from fastapi import Response
from starlette.types import Receive, Scope, Send

from engine import SampleOutput
from server.errors import INTERNAL, error_body, error_kind
from server.generation import Generation
from server.responses import AnswerHead

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"

FormatChoice = Callable[[int, SampleOutput], Mapping[str, object] | None]
"""Makes a choice's piece out of the choice's number and the new part of its sample; None if there is nothing to say."""


class EventStream(Response):
    """Sends events while they come. A client that leaves aborts the generation at once."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], generation: Generation) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", "x-request-id": generation.id})
        self._events = events
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run as an ASGI application."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with abort_on_disconnect(receive, self._generation), aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def abort_on_disconnect(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """While inside, abort the generation if the client goes away. The request's body must have been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.abort()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


async def stream_events(
    generation: Generation, head: AnswerHead, format_choice: FormatChoice, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The events of one answer.

    Args:
        generation: What the engine makes.
        head: What every event says besides its choice.
        format_choice: The endpoint's form of a piece.
        include_usage: End with an event of the token counts; the other events then say `"usage": null`.
    """
    # One event is `begin + choice + end`; the first event and each choice's last one also say what was used.
    used = orjson.dumps({"activation": generation.activation, "seed": generation.seed})
    begin = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
    end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
    end_with_used = end[:-3] + b"," + used[1:] + b"\n\n"
    first = True
    try:
        async with aclosing(generation.pieces()) as pieces:
            async for number, piece in pieces:
                events: list[bytes] = []
                for sample in piece.samples:
                    choice = format_choice(number * generation.n + sample.index, sample)
                    if choice is not None:
                        is_edge = first or sample.finish_reason is not None
                        events += (begin, orjson.dumps(choice), end_with_used if is_edge else end)
                        first = False
                if events:
                    yield b"".join(events)
        if include_usage:
            yield begin + b'],"usage":' + orjson.dumps(generation.usage) + b"," + used[1:] + b"\n\n"
        yield DONE
    except Exception as error:  # the status line has gone out: an event is the only way left to say it
        if error_kind(error) is INTERNAL:
            logger.exception("streaming %s failed", generation.id)
        yield b"data: " + orjson.dumps(error_body(error)) + b"\n\n"
