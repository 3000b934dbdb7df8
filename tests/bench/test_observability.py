"""What the benchmark of observing computes, and the process that watches."""

import asyncio
import json
import sys
import urllib.request
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

from bench.http_overhead import Side, run_http_side
from bench.observability import (
    SPANS_AT_ONCE,
    Parts,
    Watcher,
    bare_app,
    measure_alone,
    serving,
    step_counts_us,
    summarise,
)
from engine import AsyncEngine
from server.app import create_app
from server.services import Services
from server.settings import ServerSettings
from tests.engine.models.tiny import make_tiny
from tests.server.conftest import tiny_config


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-model")
    make_tiny("llama", path)
    return path


def test_loss_and_cost_are_watched_against_bare() -> None:
    bare = [Side(100, 1.0, 1.0), Side(100, 2.0, 1.0)]
    watched = [Side(100, 1.25, 1.1), Side(100, 2.0, 1.2)]

    result = summarise(bare, watched)

    assert result["throughput_loss_by_round"] == {"median": 0.1, "min": 0.0, "max": 0.2}
    assert result["throughput_loss_of_medians"] == pytest.approx(1 - 65 / 75, abs=1e-4)
    assert result["cpu_us_per_token_more"] == {"median": 1500.0, "min": 1000.0, "max": 2000.0}
    assert result["watched"]["tokens_per_second"] == {"median": 65.0, "min": 50.0, "max": 80.0}


async def test_the_sides_differ_in_counting_only(tiny_model: Path) -> None:
    engine = AsyncEngine(tiny_config(tiny_model))
    engine.start()
    bare, watched = bare_app(engine), create_app(engine, ServerSettings())
    counted = {}
    for name, app in (("bare", bare), ("watched", watched)):
        async with serving(app) as port:
            side = await run_http_side(port, ["a", "b"], 5)
        services: Services = app.state.services
        assert side.tokens == 10
        counted[name] = sum(services.metrics.generation_tokens.values())
    engine.shutdown()

    assert counted == {"bare": 0, "watched": 10}


def test_the_engines_bookkeeping_takes_time(tiny_model: Path) -> None:
    engine = AsyncEngine(tiny_config(tiny_model))

    assert step_counts_us(engine, rows=32, repeats=10) > 0

    engine.shutdown()


async def test_each_part_of_observing_has_its_price(tiny_model: Path) -> None:
    engine = AsyncEngine(tiny_config(tiny_model))
    engine.start()
    watcher = await Watcher.start()

    parts = await measure_alone(engine, ["a", "b"], 5, watcher.traces_url, rounds=3)

    spans = (await watcher.tell("rest"))["spans"]
    await watcher.stop()
    engine.shutdown()
    assert spans == 3 * SPANS_AT_ONCE
    assert min(parts.counting_us_per_token, parts.tracing_us_per_request, parts.scrape_ms, parts.step_counts_us) > 0


def test_shares_are_of_a_tokens_whole_cost() -> None:
    parts = Parts(counting_us_per_token=2, tracing_us_per_request=500, scrape_ms=4, step_counts_us=64)

    shares = parts.shares(1000, tokens_per_second=800, tokens_per_request=100, streams=32)

    assert shares == {"counting": 0.002, "tracing": 0.005, "scrapes": 0.005, "step_counts": 0.002}


async def test_the_watcher_counts_spans_and_scrapes(tiny_model: Path) -> None:
    engine = AsyncEngine(tiny_config(tiny_model))
    engine.start()
    watcher = await Watcher.start()
    spans = ExportTraceServiceRequest(
        resource_spans=[ResourceSpans(scope_spans=[ScopeSpans(spans=[Span(name="a"), Span(name="b")])])]
    )
    request = urllib.request.Request(f"{watcher.traces_url}/v1/traces", spans.SerializeToString(), method="POST")
    with await asyncio.to_thread(urllib.request.urlopen, request) as response:
        assert response.status == 200
    async with serving(create_app(engine, ServerSettings())) as port:
        await watcher.tell(f"scrape http://127.0.0.1:{port}/metrics")
        while not (counts := await watcher.tell(f"scrape http://127.0.0.1:{port}/metrics"))["scrapes"]:
            await asyncio.sleep(0.05)
        await watcher.tell("rest")
    await watcher.stop()
    engine.shutdown()

    assert counts["spans"] == 2


async def test_the_watcher_ends_with_its_input() -> None:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "bench.watcher", stdin=pipe, stdout=pipe)

    output, _ = await process.communicate(b"rest\n")

    assert process.returncode == 0
    assert json.loads(output.splitlines()[1]) == {"spans": 0, "scrapes": 0}
