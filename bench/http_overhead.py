"""What the HTTP layer costs: the engine alone against the same engine behind uvicorn, at 32 streams.

One process holds one engine and one event loop. The sides take turns in it: 32 tasks that iterate
`AsyncEngine.generate`, and 32 connections that stream `/v1/completions` from a uvicorn on the same loop to a raw-socket
client in another process (`bench.sse_reader`). Prompts differ from round to round, so that the prefix cache helps
neither side. The client shares the machine, and so its processor time is charged to the HTTP layer: the loss of
throughput is an upper bound. Processor time of the serving process per token has no such flaw, and is given for both
sides.
"""

import argparse
import asyncio
import json
import socket
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import uvicorn

from bench.prompts import PromptMaker
from bench.results import add_out_option, save, spread
from engine import AsyncEngine, EngineConfig, SamplingParams
from server.app import create_app
from server.loadgen import run_event_loop
from server.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class Side:
    """One round of one side. `cpu_seconds` is of the serving process, `client_cpu_seconds` of the client process."""

    tokens: int
    seconds: float
    cpu_seconds: float
    client_cpu_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per second, all streams together."""
        return self.tokens / self.seconds

    @property
    def cpu_us_per_token(self) -> float:
        """Processor time of the serving process for each output token, in microseconds."""
        return 1e6 * self.cpu_seconds / self.tokens


async def run_engine_side(engine: AsyncEngine, prompts: list[str], tokens: int) -> Side:
    """The engine alone: one task for each prompt."""
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=0)

    async def read(prompt: str) -> int:
        pieces = engine.generate(prompt, sampling)
        return sum([sum(len(sample.token_ids) for sample in piece.samples) async for piece in pieces])

    start, cpu = time.perf_counter(), time.process_time()
    counts = await asyncio.gather(*map(read, prompts))
    return Side(sum(counts), time.perf_counter() - start, time.process_time() - cpu)


async def run_http_side(port: int, prompts: list[str], tokens: int) -> Side:
    """The same through HTTP: one connection for each prompt, read by a client in another process."""
    fields = {
        "max_tokens": tokens,
        "ignore_eos": True,
        "seed": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    task = {
        "host": "127.0.0.1",
        "port": port,
        "path": "/v1/completions",
        "bodies": [json.dumps({"prompt": prompt, **fields}) for prompt in prompts],
    }
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.sse_reader", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    cpu = time.process_time()
    output, _ = await client.communicate(json.dumps(task).encode())
    cpu = time.process_time() - cpu
    if client.returncode != 0:
        raise RuntimeError(f"the client ended with status {client.returncode}")
    result = json.loads(output)
    return Side(result["tokens"], result["seconds"], cpu, result["cpu_seconds"])


async def run(engine: AsyncEngine, streams: int, prompt_tokens: int, tokens: int, rounds: int) -> dict[str, Any]:
    """All rounds; which side goes first alternates."""
    prompts = PromptMaker(engine)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(create_app(engine, ServerSettings()), http="httptools", ws="none", log_level="warning")
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:  # its lifespan starts the engine
        await asyncio.sleep(0.01)
    sides: dict[str, list[Side]] = {"engine": [], "http": []}
    for number in range(rounds + 1):  # round 0 warms up
        for name in ("engine", "http") if number % 2 else ("http", "engine"):
            texts = prompts.make(streams, prompt_tokens, f"{number}/{name}")
            if name == "engine":
                side = await run_engine_side(engine, texts, tokens)
            else:
                side = await run_http_side(port, texts, tokens)
            if side.tokens != streams * tokens:
                raise RuntimeError(f"{side.tokens} tokens instead of {streams * tokens}")
            if number:
                sides[name].append(side)
                print(
                    f"round {number}: {name:6} {side.tokens_per_second:8.1f} tokens/s, "
                    f"{side.cpu_us_per_token:7.1f} us CPU/token",
                    flush=True,
                )
    server.should_exit = True
    await serving
    return summarise(sides["engine"], sides["http"])


def summarise(engine: list[Side], http: list[Side]) -> dict[str, Any]:
    """The figures of all rounds: HTTP against the engine alone."""
    return {
        **compare({"engine": engine, "http": http}, cost="http_cpu_us_per_token"),
        "client_cpu_us_per_token": spread([1e6 * side.client_cpu_seconds / side.tokens for side in http], 1),
    }


def compare(sides: dict[str, list[Side]], *, cost: str) -> dict[str, Any]:
    """The rounds of two sides, and what the second loses and costs against the first, in the median of the rounds.

    Args:
        sides: By name; their rounds are pairs.
        cost: Name of the processor time that the second takes more for each token.
    """
    first, second = sides.values()
    losses = [1 - b.tokens_per_second / a.tokens_per_second for a, b in zip(first, second, strict=True)]
    costs = [b.cpu_us_per_token - a.cpu_us_per_token for a, b in zip(first, second, strict=True)]
    medians = [statistics.median(one.tokens_per_second for one in side) for side in (first, second)]
    return {
        "throughput_loss_of_medians": round(1 - medians[1] / medians[0], 4),
        "throughput_loss_by_round": spread(losses, 4),
        cost: spread(costs, 1),
        **{
            name: {
                "tokens_per_second": spread([one.tokens_per_second for one in side]),
                "cpu_us_per_token": spread([one.cpu_us_per_token for one in side], 1),
            }
            for name, side in sides.items()
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.http_overhead", description=__doc__)
    parser.add_argument("--model", help="folder, name or GGUF file (default: the default model)")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    add_out_option(parser)
    options = parser.parse_args(arguments)

    engine = AsyncEngine(EngineConfig(model=options.model), progress=print)
    results = run_event_loop(run(engine, options.streams, options.prompt_tokens, options.output_tokens, options.rounds))
    settings = {
        "model": engine.info.name,
        "dtype": engine.info.dtype,
        "threads": engine.info.threads,
        **{name: value for name, value in vars(options).items() if name not in ("model", "out")},
    }
    path = save("http-overhead", settings, results, options.out)
    print(json.dumps(results, indent=2))
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
