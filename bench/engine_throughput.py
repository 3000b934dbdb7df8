"""Throughput of the engine alone: `AsyncEngine`, no HTTP, 1 to 32 streams, each mode and all modes mixed.

The cases take turns, and each figure is the median of several rounds, so that a machine that slows down or speeds up
does not favour one of them.
"""

import argparse
import asyncio
import time
from dataclasses import asdict, dataclass
from typing import Any

from bench.prompts import PromptMaker
from bench.results import add_out_option, save, spread
from engine import Activation, ActivationMode, AsyncEngine, DType, EngineConfig, SamplingParams
from server.loadgen import run_event_loop

MODES = {
    "silu": [Activation()],
    "stochastic": [Activation(ActivationMode.STOCHASTIC, p=0.8)],
    "relu": [Activation(ActivationMode.RELU)],
}
CASES: dict[str, list[Activation]] = {
    **MODES,
    "mixed": [activation for group in MODES.values() for activation in group],
}


@dataclass(frozen=True, slots=True)
class Round:
    """One round of one case.

    Attributes:
        total: Output tokens per second from the first submission to the last token.
        decode: Output tokens per second from the moment at which every stream has its first token.
        ttft_ms: Mean time to first token.
    """

    total: float
    decode: float
    ttft_ms: float


async def run_round(engine: AsyncEngine, prompts: list[str], activations: list[Activation], tokens: int) -> Round:
    """Run one stream for each prompt; activations are dealt in turn."""
    arrivals: list[list[tuple[float, int]]] = [[] for _ in prompts]  # of each stream: time and tokens of each piece
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=0)

    async def read(index: int) -> None:
        async for output in engine.generate(prompts[index], sampling, activations[index % len(activations)]):
            arrivals[index].append((time.perf_counter(), sum(len(sample.token_ids) for sample in output.samples)))

    start = time.perf_counter()
    await asyncio.gather(*(read(index) for index in range(len(prompts))))
    end = time.perf_counter()
    all_started = max(pieces[0][0] for pieces in arrivals)
    decoded = sum(count for pieces in arrivals for moment, count in pieces if moment > all_started)
    return Round(
        total=len(prompts) * tokens / (end - start),
        decode=decoded / (end - all_started),
        ttft_ms=1000 * sum(pieces[0][0] - start for pieces in arrivals) / len(prompts),
    )


async def run(
    engine: AsyncEngine, streams: list[int], prompt_tokens: int, tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """All cases, in turns."""
    prompts = PromptMaker(engine)
    engine.start()
    measured: dict[tuple[int, str], list[Round]] = {(count, case): [] for count in streams for case in CASES}
    for number in range(rounds + 1):  # round 0 warms up
        for (count, case), results in measured.items():
            texts = prompts.make(count, prompt_tokens, f"{number}/{count}/{case}")
            result = await run_round(engine, texts, CASES[case], tokens)
            if number:
                results.append(result)
                print(f"round {number}: {count:3} streams, {case:10} {result.total:8.1f} tokens/s", flush=True)
    return [
        {
            "streams": count,
            "case": case,
            "tokens_per_second": spread([result.total for result in results]),
            "decode_tokens_per_second": spread([result.decode for result in results]),
            "ttft_ms": spread([result.ttft_ms for result in results]),
        }
        for (count, case), results in measured.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine_throughput", description=__doc__)
    parser.add_argument("--model", help="folder, name or GGUF file (default: the default model)")
    parser.add_argument("--dtype", choices=list(DType), type=DType, default=DType.AUTO)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    add_out_option(parser)
    options = parser.parse_args(arguments)
    if options.output_tokens < 2:
        parser.error("--output-tokens must be at least 2: decoding starts with the second token")

    config = EngineConfig(model=options.model, dtype=options.dtype, allow_untuned_activations=True)
    engine = AsyncEngine(config, progress=print)
    try:
        results = run_event_loop(
            run(engine, options.streams, options.prompt_tokens, options.output_tokens, options.rounds)
        )
        stats = engine.stats()
    finally:
        engine.shutdown()
    zeros = {
        mode: round(sum(stats.ffn_zeros[mode]) / total, 4)
        for mode, counts in stats.ffn_elements.items()
        if (total := sum(counts))
    }
    settings = {
        "model": engine.info.name,
        "dtype": engine.info.dtype,
        "tuned": engine.info.support.tuned,
        "kernels": engine.info.kernels,
        "engine": {**asdict(engine.config), "model": None},  # a path says nothing to others
        **{name: value for name, value in vars(options).items() if name not in ("model", "dtype", "out")},
    }
    path = save(
        "engine-throughput", settings, {"cases": results, "ffn_zeros": zeros, "relu_rows": stats.ffn_rows}, options.out
    )
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
