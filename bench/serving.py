"""What clients see: `siluette bench` against a server process with the default model, at several loads."""

import argparse
import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from rich.console import Console

from bench.results import add_out_option, save
from server.loadgen import BenchConfig, run_benchmark, run_event_loop
from server.loadgen_client import RequestError, Target
from server.loadgen_report import print_report
from server.loadgen_workload import Length, ModeMix, Workload

MIXES = ("silu=1", "stochastic=1", "relu=1", "silu=1,stochastic=1,relu=1")
SERVING = re.compile(rb"Serving \S+ at (http://\S+)")


@asynccontextmanager
async def running_server(*options: str) -> AsyncIterator[Target]:
    """A server process on a free port, ready to answer; stopped at the end."""
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", *options]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        while line := await process.stdout.readline():
            print(line.decode(), end="", flush=True)
            if match := SERVING.search(line):
                target = Target.parse(match[1].decode())
                await _wait_until_ready(target)
                yield target
                return
        raise RuntimeError("the server did not start")
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _wait_until_ready(target: Target) -> None:
    while True:
        try:
            await target.fetch("GET", "/health/ready")
        except RequestError:
            await asyncio.sleep(0.05)
        else:
            return


async def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All mixes at all concurrencies."""
    results: list[dict[str, Any]] = []
    model = [] if options.model is None else [options.model]
    async with running_server(*model, "--allow-untuned-activations") as target:
        for concurrency in options.concurrency:
            for mix in MIXES:
                workload = Workload(
                    num_requests=options.rounds * concurrency,
                    prompt_tokens=Length.parse(options.prompt_tokens),
                    output_tokens=Length.parse(options.output_tokens),
                    mode_mix=ModeMix.parse(mix),
                    seed=len(results),  # the same prompts again would come from the prefix cache
                )
                config = BenchConfig(target, workload, concurrency=concurrency, warmup=concurrency)
                report = await run_benchmark(config)
                print(f"\n{concurrency} at a time, {mix}")
                print_report(report, Console())
                document = report.to_json()
                del document["config"]["base_url"]  # the port was a free one
                results.append(document)
    return results


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--model", help="folder, name or GGUF file (default: the default model)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", default="128+-64", metavar="LENGTH")
    parser.add_argument("--output-tokens", default="64+-32", metavar="LENGTH")
    parser.add_argument("--rounds", type=int, default=4, help="requests for each connection (default: 4)")
    add_out_option(parser)
    options = parser.parse_args(arguments)
    results = run_event_loop(run(options))
    settings = {name: value for name, value in vars(options).items() if name not in ("model", "out")}
    print(f"Written to {save('serving', settings, results, options.out)}")


if __name__ == "__main__":
    main()
