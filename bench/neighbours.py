"""What busy neighbours cost: a server with pinned and with free compute threads, beside programs that keep cores busy.

Neighbours are processes of one endless loop. Within a round both servers, started anew, meet no neighbour, one, and one
for each core. `slowdown` is against the same server without neighbours, by round; one neighbour for each core leaves
half of each, so that 2 would be fair.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.results import add_out_option, save, spread
from bench.serving import running_server
from server.loadgen import BenchConfig, run_benchmark, run_event_loop
from server.loadgen_client import Target
from server.loadgen_workload import Length, ModeMix, Workload
from server.machine import describe_machine

SERVERS = {"pinned": "--pin-threads", "free": "--no-pin-threads"}


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many neighbours."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def measure(target: Target, streams: int, tokens: int, seed: int) -> dict[str, float]:
    """Output tokens per second and milliseconds between a stream's tokens."""
    workload = Workload(
        num_requests=streams,
        prompt_tokens=Length.parse("16"),
        output_tokens=Length.parse(str(tokens)),
        mode_mix=ModeMix.parse("silu=1"),
        seed=seed,
    )
    report = await run_benchmark(BenchConfig(target, workload, concurrency=streams, warmup=1))
    document = report.to_json()
    gaps = document["total"]["itl"]
    return {
        "tokens_per_second": document["throughput"]["output_tokens_per_second"],
        **{f"gap_{name}_ms": gaps[name] for name in ("p50", "p99")},
    }


async def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All servers, neighbours and loads, in turns."""
    neighbours = sorted({0, 1, describe_machine().cores})
    found: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    for number in range(options.rounds):
        for name, option in SERVERS.items():
            async with running_server(
                option, *(["--quantize", options.quantize] if options.quantize else [])
            ) as target:
                for streams in options.streams:
                    for count in neighbours:
                        with busy(count):
                            await asyncio.sleep(0.5)
                            figures = await measure(target, streams, options.tokens, number)
                        found.setdefault((name, streams, count), []).append(figures)
                        print(f"{name}, {streams} streams, {count} neighbours: {figures}", flush=True)
    return [_summary(found, *key) for key in found]


def _summary(
    found: dict[tuple[str, int, int], list[dict[str, float]]], name: str, streams: int, neighbours: int
) -> dict[str, Any]:
    own, alone = found[name, streams, neighbours], found[name, streams, 0]
    rates = [[figures["tokens_per_second"] for figures in rounds] for rounds in (own, alone)]
    slowdown = [quiet / rate for rate, quiet in zip(*rates, strict=True)]
    return {
        "threads": name,
        "streams": streams,
        "neighbours": neighbours,
        **{figure: spread([figures[figure] for figures in own]) for figure in own[0]},
        **({"slowdown": round(statistics.median(slowdown), 2)} if neighbours else {}),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.neighbours", description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128, help="of each answer (default: 128)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantize", choices=["int8", "int4"], help="default: bfloat16")
    add_out_option(parser)
    options = parser.parse_args(arguments)
    if not hasattr(os, "sched_getaffinity"):
        parser.error("threads are pinned on Linux only")
    results = run_event_loop(run(options))
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    print(f"Written to {save('neighbours', settings, results, options.out)}")


if __name__ == "__main__":
    main()
