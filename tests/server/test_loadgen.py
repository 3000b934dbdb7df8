"""The load generator against the real application on a tiny random model."""

import asyncio
import json
import math
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request

from server.loadgen import BenchConfig, Endpoint, run_benchmark
from server.loadgen_client import RequestError, Target
from server.loadgen_workload import Length, ModeMix, Vocabulary, Workload, plan_requests

WORKLOAD = Workload(9, Length(6), Length(5), ModeMix.parse("silu,stochastic,relu"), seed=3)


class Recorder:
    """Passes everything on to an application and keeps what completion requests say and how many run at once."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.bodies: list[dict[str, Any]] = []
        self.most_in_flight = 0
        self._in_flight = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not scope["path"].endswith("completions"):
            await self.app(scope, receive, send)
            return
        body = await Request(scope, receive).body()
        self.bodies.append(json.loads(body))
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Any:
            return next(messages, None) or await receive()

        async def watch(message: Any) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self._in_flight -= 1  # before the client can know
            await send(message)

        await self.app(scope, replay, watch)


@dataclass(frozen=True)
class Served:
    """The application behind a real port."""

    target: Target
    recorder: Recorder

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return self.recorder.bodies


@pytest.fixture
async def served(app: FastAPI) -> AsyncIterator[Served]:
    listener = socket.create_server(("127.0.0.1", 0))
    recorder = Recorder(app)
    # The engine is started already and outlives the application: no lifespan.
    server = uvicorn.Server(uvicorn.Config(recorder, lifespan="off", ws="none", log_level="warning"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield Served(Target("127.0.0.1", listener.getsockname()[1]), recorder)
    server.should_exit = True
    await serving


class TestRun:
    @pytest.mark.parametrize("endpoint", ["completions", "chat"])
    async def test_measures_every_mode(self, served: Served, endpoint: Endpoint) -> None:
        config = BenchConfig(served.target, WORKLOAD, endpoint=endpoint, concurrency=4, warmup=2, p=0.8)
        report = await run_benchmark(config)
        assert report.errors == ()
        assert report.usage_reported
        assert {mode: summary.completed for mode, summary in report.by_mode.items()} == {
            "silu": 3,
            "stochastic": 3,
            "relu": 3,
        }
        assert report.total.output_tokens == 9 * 5
        assert report.total.input_tokens > 0
        total = report.total
        assert total.ttft is not None
        assert total.e2e is not None
        assert 0 < total.ttft.p50 <= total.e2e.p50 <= 1000 * report.duration

    async def test_same_seed_sends_the_same_requests(self, served: Served) -> None:
        target, bodies = served.target, served.bodies
        config = BenchConfig(target, WORKLOAD, concurrency=1, warmup=2)
        await run_benchmark(config)
        first = bodies.copy()
        bodies.clear()
        await run_benchmark(config)
        assert bodies == first
        assert len(first) == 3 + 2 + 9  # probes, warm-up, measured
        assert len({body["prompt"] for body in first}) == 1 + 2 + 9  # probes differ in their mode

    async def test_fields_outside_of_openai_are_sent_on_demand_only(self, served: Served) -> None:
        target, bodies = served.target, served.bodies
        workload = replace(WORKLOAD, mode_mix=ModeMix.parse("silu"))
        await run_benchmark(BenchConfig(target, workload, warmup=0, ignore_eos=False))
        openai = {"model", "prompt", "max_tokens", "temperature", "seed", "stream", "stream_options"}
        assert {frozenset(body) for body in bodies} == {frozenset(openai)}

        bodies.clear()
        await run_benchmark(BenchConfig(target, WORKLOAD, warmup=0, p=0.9, scope="decode"))
        activations = {json.dumps(body["activation"]) for body in bodies}
        assert activations == {
            '{"mode": "silu"}',
            '{"mode": "stochastic", "p": 0.9, "scope": "decode"}',
            '{"mode": "relu", "scope": "decode"}',
        }
        assert all(body["ignore_eos"] for body in bodies)

    async def test_concurrency_is_the_most_in_flight(self, served: Served) -> None:
        workload = replace(WORKLOAD, num_requests=12, output_tokens=Length(20))
        await run_benchmark(BenchConfig(served.target, workload, concurrency=3, warmup=0))
        assert served.recorder.most_in_flight == 3

    async def test_requests_wait_for_their_arrival(self, served: Served) -> None:
        workload = replace(WORKLOAD, request_rate=20.0)
        report = await run_benchmark(BenchConfig(served.target, workload, concurrency=9, warmup=0))
        # The run cannot be shorter than the time of the last arrival.
        last = plan_requests(workload, Vocabulary())[-1].arrival
        assert last > 0.1
        assert report.duration >= last


class TestErrors:
    async def test_refused_probe_ends_the_run_with_the_servers_message(self, served: Served) -> None:
        target, bodies = served.target, served.bodies
        workload = replace(WORKLOAD, output_tokens=Length(100_000))
        with pytest.raises(RequestError, match="context") as caught:
            await run_benchmark(BenchConfig(target, workload))
        assert caught.value.kind == "http_400"
        assert len(bodies) == 1

    async def test_unknown_model_ends_the_run(self, served: Served) -> None:
        with pytest.raises(RequestError, match="other") as caught:
            await run_benchmark(BenchConfig(served.target, WORKLOAD, model="other"))
        assert caught.value.kind == "http_404"

    async def test_failures_are_counted_and_the_rest_is_measured(self, served: Served) -> None:
        # Contexts hold 256 tokens: with this range some requests fit and some do not. The probe does.
        workload = replace(WORKLOAD, num_requests=30, output_tokens=Length(200, 190), seed=probe_that_fits())
        report = await run_benchmark(BenchConfig(served.target, workload, warmup=0))
        assert [error.kind for error in report.errors] == ["http_400"]
        assert report.total.completed + report.errors[0].count == 30
        assert report.total.completed > 0


def probe_that_fits() -> int:
    """A seed whose probe asks for few tokens."""
    for seed in range(100):
        workload = Workload(1, Length(6), Length(200, 190), ModeMix.parse("silu,stochastic,relu"), seed=seed)
        if plan_requests(replace(workload, request_rate=math.inf), Vocabulary(), "probe")[0].max_tokens < 60:
            return seed
    raise AssertionError("no seed has a small probe")


class TestConfig:
    def test_document_has_no_credentials_and_no_infinity(self) -> None:
        document = BenchConfig(Target("h", 80, authorization="Bearer secret"), WORKLOAD).to_json()
        text = json.dumps(document, allow_nan=False)
        assert "secret" not in text
        assert document["base_url"] == "http://h:80"
        assert document["mode_mix"] == "silu=1,stochastic=1,relu=1"
        assert document["request_rate"] is None

    @pytest.mark.parametrize("change", [{"concurrency": 0}, {"warmup": -1}])
    def test_impossible_settings_are_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="must be at least"):
            BenchConfig(Target("h", 80), WORKLOAD, **change)
