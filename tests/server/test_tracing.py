"""Traces, by OpenTelemetry's own SDK and an exporter that keeps spans in memory."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from engine import AsyncEngine
from server.app import create_app
from server.settings import ServerSettings
from server.tracing import RequestTracer
from tests.server.conftest import client_of, tiny_config
from tests.server.helpers import MODES, mode_id

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Traced:
    """An application whose spans are kept."""

    def __init__(self, engine: AsyncEngine, **settings: Any) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.app: FastAPI = create_app(
            engine, ServerSettings(served_model_name="tiny", **settings), RequestTracer(provider)
        )

    def spans(self) -> dict[str, list[ReadableSpan]]:
        found: dict[str, list[ReadableSpan]] = {}
        for span in self.exporter.get_finished_spans():
            found.setdefault(span.name, []).append(span)
        return found


@pytest.fixture
def traced(engine: AsyncEngine) -> Traced:
    return Traced(engine)


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize("activation", MODES, ids=mode_id)
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_request_is_a_span_with_its_parts(traced: Traced, activation: dict[str, Any], streamed: bool) -> None:
    request = {"prompt": "Hi there", "max_tokens": 6, "ignore_eos": True, "temperature": 0.5, "seed": 3, "n": 2}
    async with client_of(traced.app) as client:
        await client.post("/v1/completions", json={**request, "activation": activation, "stream": streamed})

    spans = traced.spans()
    assert set(spans) == {"text_completion tiny", "queue", "prefill", "decode"}
    (parent,), (queue,), (prefill,), (decode,) = (
        spans[name] for name in ("text_completion tiny", "queue", "prefill", "decode")
    )
    assert parent.kind is SpanKind.SERVER
    assert parent.status.status_code is StatusCode.UNSET
    attributes = attributes_of(parent)
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "siluette",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.output_tokens": 12,
        "siluette.activation.mode": activation["mode"],
        "siluette.seed": 3,
    }
    assert expected.items() <= attributes.items()
    assert attributes.get("siluette.activation.p") == activation.get("p")
    assert attributes["gen_ai.usage.input_tokens"] > 0
    assert attributes["gen_ai.response.id"].startswith("cmpl-")
    assert attributes_of(decode)["gen_ai.usage.output_tokens"] == 12
    for part in (queue, prefill, decode):
        assert part.parent is not None
        assert part.parent.span_id == parent.context.span_id
        assert part.context.trace_id == parent.context.trace_id


async def test_parts_follow_one_another_within_the_request(traced: Traced) -> None:
    async with client_of(traced.app) as client:
        await client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
        )

    spans = traced.spans()
    (parent,), (queue,), (prefill,), (decode,) = (spans[name] for name in ("chat tiny", "queue", "prefill", "decode"))
    assert parent.start_time is not None
    assert parent.end_time is not None
    slack = 50_000_000  # two clocks: the engine's and the system's
    assert abs((queue.start_time or 0) - parent.start_time) < slack
    assert queue.end_time == prefill.start_time
    assert prefill.end_time == decode.start_time
    assert (queue.start_time or 0) <= (prefill.start_time or 0) <= (decode.start_time or 0) <= (decode.end_time or 0)
    assert (decode.end_time or 0) <= parent.end_time + slack


async def test_the_clients_trace_goes_on(traced: Traced) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=x"}
    async with client_of(traced.app) as client:
        await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2}, headers=headers)

    (parent,) = traced.spans()["text_completion tiny"]
    assert parent.parent is not None
    assert f"{parent.parent.span_id:016x}" == PARENT
    assert {f"{span.context.trace_id:032x}" for spans in traced.spans().values() for span in spans} == {TRACE}


@pytest.mark.parametrize("flags", ["00"])
async def test_what_the_client_does_not_sample_is_not_traced(traced: Traced, flags: str) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}
    async with client_of(traced.app) as client:
        response = await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2}, headers=headers)

    assert response.status_code == 200
    assert traced.spans() == {}


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01"])
async def test_a_header_that_is_none_begins_a_new_trace(traced: Traced, header: str) -> None:
    async with client_of(traced.app) as client:
        await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2}, headers={"traceparent": header})

    (parent,) = traced.spans()["text_completion tiny"]
    assert parent.parent is None


async def test_each_prompt_has_its_own_parts(traced: Traced) -> None:
    async with client_of(traced.app) as client:
        await client.post("/v1/completions", json={"prompt": ["Hi", "Ho", "He"], "max_tokens": 2, "ignore_eos": True})

    spans = traced.spans()
    assert len(spans["text_completion tiny"]) == 1
    for name in ("queue", "prefill", "decode"):
        assert [attributes_of(span)["siluette.prompt.index"] for span in spans[name]] == [0, 1, 2]


async def test_prompts_and_answers_stay_out_of_traces(traced: Traced) -> None:
    async with client_of(traced.app) as client:
        await client.post("/v1/completions", json={"prompt": "Mallory's secret", "max_tokens": 2, "user": "mallory"})

    assert "allory" not in json.dumps([span.to_json() for spans in traced.spans().values() for span in spans])


async def test_a_refused_request_says_why(traced: Traced) -> None:
    async with client_of(traced.app) as client:
        response = await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 100_000})

    assert response.status_code == 400
    (parent,) = traced.spans()["text_completion tiny"]
    assert set(traced.spans()) == {"text_completion tiny"}
    assert parent.status.status_code is StatusCode.ERROR
    assert attributes_of(parent)["error.type"] == "context_length_exceeded"


async def test_a_client_that_leaves_ends_the_span_without_an_error(tiny_model: Path) -> None:
    engine = AsyncEngine(tiny_config(tiny_model))
    traced = Traced(engine)
    async with traced.app.router.lifespan_context(traced.app):
        request = {
            "type": "http.request",
            "body": json.dumps({"prompt": "x", "max_tokens": 200, "stream": True}).encode(),
        }
        received: asyncio.Queue[Any] = asyncio.Queue()
        received.put_nowait(request)

        async def send(message: Any) -> None:
            if message.get("body"):
                received.put_nowait({"type": "http.disconnect"})

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
        scope["headers"] = [(b"content-type", b"application/json")]
        await traced.app(scope, received.get, send)

    (parent,) = traced.spans()["text_completion tiny"]
    assert attributes_of(parent)["gen_ai.response.finish_reasons"] == ("abort",)
    assert parent.status.status_code is StatusCode.UNSET
    assert "decode" in traced.spans()


async def test_a_dead_engine_is_an_error(tiny_model: Path) -> None:
    engine = AsyncEngine(tiny_config(tiny_model))
    traced = Traced(engine)
    async with traced.app.router.lifespan_context(traced.app), client_of(traced.app) as client:
        request = {"prompt": "x", "max_tokens": 240, "ignore_eos": True}
        running = asyncio.create_task(client.post("/v1/completions", json=request))
        while not engine.stats().running:
            await asyncio.sleep(0)
        await asyncio.to_thread(engine.shutdown)
        response: httpx.Response = await running

    assert response.status_code == 503
    (parent,) = traced.spans()["text_completion tiny"]
    assert parent.status.status_code is StatusCode.ERROR
    assert attributes_of(parent)["error.type"] == "engine_stopped"
