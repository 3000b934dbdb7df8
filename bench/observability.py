"""What observing costs: the same server watched in every way that it offers, and not watched at all, at 32 streams.

One process holds one engine and two applications around it on one event loop. The sides take turns: 32 connections
that stream `/v1/completions` from one or the other, to a raw-socket client in another process (`bench.sse_reader`).

- `watched`: requests and tokens are counted, `/metrics` is scraped each second, and each request is traced, its spans
  sent as OTLP over HTTP to a receiver that throws them away (both in the process `bench.watcher`).
- `bare`: the application's counting is replaced by nothing; nobody scrapes, nothing is traced.

A difference of two throughputs says little when it is smaller than the machine's noise. So each part is measured alone,
too (`bench.observing`), by processor time, and their sum set against what a token costs in all: `alone`. The engine
counts zeros, draws and times of phases on both sides, for that is part of its kernels and steps and cannot be turned
off; `step_counts_us` is what its bookkeeping outside the kernels takes in a step.

Prompts differ from round to round, so that the prefix cache helps neither side.
"""

import argparse
import asyncio
import json
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI

from bench.http_overhead import Side, compare, run_http_side
from bench.observing import record, replay, scrape_ms
from bench.prompts import PromptMaker
from bench.results import add_out_option, save
from engine import ActivationMode, AsyncEngine, EngineConfig, RequestOutput, SamplingParams
from engine.draw_counters import DrawCounters
from engine.ffn_work import FfnWork, WeightSizes
from engine.step_clock import StepClock, StepPhase
from server.app import create_app
from server.loadgen import run_event_loop
from server.metrics import PromptObserver, ServerMetrics
from server.services import Services
from server.settings import ServerSettings
from server.tracing_setup import create_tracer

SIDES = ("bare", "watched")
SPANS_AT_ONCE = 1024  # that wait to be sent; OpenTelemetry drops what is beyond 2,048


class _NoObserver(PromptObserver):
    """Looks away."""

    def piece(self, piece: RequestOutput) -> None:
        """Count nothing."""

    def finished(self) -> None:
        """Count nothing."""

    def aborted(self) -> None:
        """Count nothing."""

    def failed(self) -> None:
        """Count nothing."""


class _NoMetrics(ServerMetrics):
    """Observes no prompt."""

    def observe_prompt(self, mode: ActivationMode, prompt_tokens: int) -> PromptObserver:
        """An observer that looks away."""
        return _NoObserver(self, mode)


def bare_app(engine: AsyncEngine) -> FastAPI:
    """The application without counting and tracing."""
    app = create_app(engine, ServerSettings())
    services: Services = app.state.services
    fields = {name: getattr(services, name) for name in Services.__slots__}
    app.state.services = Services(**{**fields, "metrics": _NoMetrics(engine)})
    return app


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[int]:
    """The application on a port of its own. Its lifespan is not run: the engine is shared."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http="httptools", ws="none", log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task


class Watcher:
    """The process that receives traces, and scrapes while it is told to."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.traces_url = f"http://127.0.0.1:{port}"

    @classmethod
    async def start(cls) -> "Watcher":
        """Start it; its first line is the receiver's port."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "bench.watcher", stdin=pipe, stdout=pipe)
        assert process.stdout is not None
        return cls(process, int(await process.stdout.readline()))

    async def tell(self, command: str) -> dict[str, int]:
        """Send a command; the answer counts what was done so far."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n".encode())
        await self._process.stdin.drain()
        counts: dict[str, int] = json.loads(await self._process.stdout.readline())
        return counts

    async def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


def step_counts_us(engine: AsyncEngine, rows: int, repeats: int = 2000) -> float:
    """Microseconds that the engine's bookkeeping outside the kernels takes in a step of so many stochastic rows."""
    config = engine.info
    clock, draws = StepClock(), DrawCounters()
    sizes = WeightSizes(layers=config.weight_bytes, neuron=1, head=1, embedding_row=1)
    work = FfnWork(config.hidden_size, config.num_layers * config.intermediate_size, sizes)
    modes, thresholds = np.ones(rows, np.int64), np.full(rows, 2**31, np.int64)
    counts = np.full((config.num_layers, rows), 100, np.int64)
    begin = time.perf_counter()
    for _ in range(repeats):
        clock.start()
        for phase in StepPhase:
            clock.lap(phase)
        draws.add(modes, thresholds, counts, counts)
        work.add(rows, 1, None, rows, 100)
    return 1e6 * (time.perf_counter() - begin) / repeats


@dataclass(frozen=True, slots=True)
class Parts:
    """Processor time of each way of observing, measured alone."""

    counting_us_per_token: float
    tracing_us_per_request: float
    scrape_ms: float
    step_counts_us: float

    def shares(
        self, cpu_us_per_token: float, *, tokens_per_second: float, tokens_per_request: int, streams: int
    ) -> dict[str, float]:
        """Of the processor time of a token, by part: each request traced, a scrape each second."""
        us_per_token = {
            "counting": self.counting_us_per_token,
            "tracing": self.tracing_us_per_request / tokens_per_request,
            "scrapes": 1e3 * self.scrape_ms / tokens_per_second,
            "step_counts": self.step_counts_us / streams,
        }
        return {name: round(us / cpu_us_per_token, 5) for name, us in us_per_token.items()}


async def measure_alone(
    engine: AsyncEngine, prompts: list[str], tokens: int, traces_url: str, rounds: int = 7
) -> Parts:
    """Each part by itself, medians of rounds."""
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=0)
    recordings = await record(engine, prompts, sampling)
    repeats = max(1, SPANS_AT_ONCE // 4 // len(recordings))
    watching = ServerSettings(otlp_endpoint=traces_url)
    counting, tracing, scrapes, steps = [], [], [], []
    for _ in range(rounds):
        counted: Services = create_app(engine, ServerSettings()).state.services
        traced: Services = create_app(engine, watching, create_tracer(watching)).state.services
        bare, only_counted, all_of_it = [
            await replay(services, recordings, sampling, repeats)
            for services in (bare_app(engine).state.services, counted, traced)
        ]
        counting.append(1e6 * (only_counted.cpu_seconds - bare.cpu_seconds) / bare.tokens)
        tracing.append(1e6 * (all_of_it.cpu_seconds - only_counted.cpu_seconds) / bare.requests)
        scrapes.append(scrape_ms(traced.metrics))
        steps.append(step_counts_us(engine, len(prompts)))
    return Parts(*(round(statistics.median(values), 2) for values in (counting, tracing, scrapes, steps)))


async def run(engine: AsyncEngine, streams: int, prompt_tokens: int, tokens: int, rounds: int) -> dict[str, Any]:
    """All rounds; which side goes first alternates."""
    engine.start()
    prompts = PromptMaker(engine)
    watcher = await Watcher.start()
    tracer = create_tracer(ServerSettings(otlp_endpoint=watcher.traces_url))
    sides: dict[str, list[Side]] = {name: [] for name in SIDES}
    async with (
        serving(bare_app(engine)) as bare_port,
        serving(create_app(engine, ServerSettings(), tracer)) as watched_port,
    ):
        ports = {"bare": bare_port, "watched": watched_port}
        for number in range(rounds + 1):  # round 0 warms up
            for name in SIDES if number % 2 else SIDES[::-1]:
                texts = prompts.make(streams, prompt_tokens, f"{number}/{name}")
                if name == "watched":
                    await watcher.tell(f"scrape http://127.0.0.1:{watched_port}/metrics")
                side = await run_http_side(ports[name], texts, tokens)
                counts = await watcher.tell("rest")
                if side.tokens != streams * tokens:
                    raise RuntimeError(f"{side.tokens} tokens instead of {streams * tokens}")
                if number:
                    sides[name].append(side)
                    print(f"round {number}: {name:7} {side.tokens_per_second:8.1f} tokens/s", flush=True)
    if tracer is not None:
        await asyncio.to_thread(tracer.shutdown)
    counts = await watcher.tell("rest")
    if counts["spans"] < 4 * streams * rounds:  # a request, its queue, prefill and decode
        raise RuntimeError(f"the receiver got {counts['spans']} spans")
    results = summarise(sides["bare"], sides["watched"])
    whole = statistics.median(side.cpu_us_per_token for side in sides["bare"])
    speed = statistics.median(side.tokens_per_second for side in sides["bare"])
    texts = prompts.make(streams, prompt_tokens, "alone")
    parts = await measure_alone(engine, texts, tokens, watcher.traces_url)
    shares = parts.shares(whole, tokens_per_second=speed, tokens_per_request=tokens, streams=streams)
    alone = {**asdict(parts), "shares": shares, "share": round(sum(shares.values()), 5)}
    await watcher.stop()
    return {**results, "scrapes": counts["scrapes"], "spans": counts["spans"], "alone": alone}


def summarise(bare: list[Side], watched: list[Side]) -> dict[str, Any]:
    """The figures of all rounds: watched against bare."""
    return compare({"bare": bare, "watched": watched}, cost="cpu_us_per_token_more")


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.observability", description=__doc__)
    parser.add_argument("--model", help="folder, name or GGUF file (default: the default model)")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    add_out_option(parser)
    options = parser.parse_args(arguments)

    engine = AsyncEngine(EngineConfig(model=options.model), progress=print)
    results = run_event_loop(run(engine, options.streams, options.prompt_tokens, options.output_tokens, options.rounds))
    engine.shutdown()
    settings = {
        "model": engine.info.name,
        "dtype": engine.info.dtype,
        "threads": engine.info.threads,
        **{name: value for name, value in vars(options).items() if name not in ("model", "out")},
    }
    path = save("observability", settings, results, options.out)
    print(json.dumps(results, indent=2))
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
