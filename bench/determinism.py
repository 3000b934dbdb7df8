"""What `--deterministic` costs: prompts and decoding with and without it, taking turns, each turn a process of its own.

A process of its own, because compute threads belong to the thread that starts them: two engines in one process would
slow each other down.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from bench.results import add_out_option, save, spread
from engine import LLM, Activation, ActivationMode, EngineConfig, SamplingParams

SIDES = {"deterministic": True, "free": False}
PROMPT_TOKENS = (128, 512)
STREAMS = (1, 8, 32)
OUTPUT_TOKENS = 48


def measure(deterministic: bool, model: str | None) -> dict[str, float]:
    """Every figure once: seconds to the first token of a prompt, and tokens per second of some streams."""
    config = EngineConfig(
        model=model, deterministic=deterministic, prefix_caching=False, allow_untuned_activations=True
    )
    figures: dict[str, float] = {}
    with LLM(config=config) as llm:
        llm.generate([[5, 6, 7]] * STREAMS[-1], SamplingParams(max_tokens=4))
        for length in PROMPT_TOKENS:
            prompt = [10 + 7 * place % 4000 for place in range(length)]
            start = time.perf_counter()
            llm.generate(prompt, SamplingParams(max_tokens=1))
            figures[f"ttft_ms, {length} tokens"] = 1000 * (time.perf_counter() - start)
        sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True, seed=1)
        for streams in STREAMS:
            for mode in (ActivationMode.SILU, ActivationMode.RELU):
                start = time.perf_counter()
                llm.generate([[5, 6, 7 + stream] for stream in range(streams)], sampling, Activation(mode))
                rate = streams * OUTPUT_TOKENS / (time.perf_counter() - start)
                figures[f"tokens_per_second, {streams} streams, {mode}"] = rate
    return figures


def run(rounds: int, model: str | None) -> dict[str, Any]:
    """All rounds, sides in turns; medians of both sides and of the ratio within a round."""
    measured: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(1, rounds + 1):
        for side, results in measured.items():
            command = [
                sys.executable,
                "-m",
                "bench.determinism",
                "--side",
                side,
                *(["--model", model] if model else []),
            ]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(output))
            print(f"round {number}: {side} done", flush=True)
    return {
        figure: {
            **{side: spread([result[figure] for result in results]) for side, results in measured.items()},
            "deterministic_over_free": spread(
                [a[figure] / b[figure] for a, b in zip(*measured.values(), strict=True)], digits=3
            ),
        }
        for figure in measured["deterministic"][0]
    }


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.determinism", description=__doc__)
    parser.add_argument("--model", help="folder, name or GGUF file (default: the default model)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=list(SIDES), help="measure one side once and print its figures as JSON")
    add_out_option(parser)
    options = parser.parse_args(arguments)
    if options.side:
        print(json.dumps(measure(SIDES[options.side], options.model)))
        return
    settings = {"rounds": options.rounds, "output_tokens": OUTPUT_TOKENS}
    print(f"Written to {save('determinism', settings, run(options.rounds, options.model), options.out)}")


if __name__ == "__main__":
    main()
