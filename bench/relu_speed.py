"""What the zeros of RELU mode buy: decoding end to end, and the feed-forward blocks alone, layer by layer.

SILU and RELU take turns in one process, and each figure is the median of several rounds, so that a machine that slows
down or speeds up does not favour one of them. Prompts are real and decoding is greedy: the zeros are those of a model
that writes text.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.relu_feed_forward import RowsResult, measure, recording, split
from bench.relu_speed_plot import plot
from bench.results import add_out_option, plot_path, save, spread
from engine import Activation, ActivationMode, EngineConfig, EngineError, SamplingParams
from engine.engine import Engine
from evaluation.sparsity import zero_shares

MODES = (ActivationMode.SILU, ActivationMode.RELU)
WARM_UP_STEPS = 4
PROMPTS = (
    "Explain how a bicycle stays upright when it moves.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "What should I think about before I adopt a dog?",
    "Describe the water cycle to a ten-year-old child.",
    "Give me a recipe for a vegetable soup and explain each step.",
    "How does a computer store a photograph?",
    "Write a polite letter that asks a landlord to repair the heating.",
    "What were the causes of the First World War?",
    "Plan a three-day walk in the mountains for two beginners.",
    "Explain the difference between a virus and a bacterium.",
    "Write a dialogue between a baker and a customer who wants an unusual cake.",
    "How can I learn to play the piano as an adult?",
    "Summarise what an operating system does.",
    "Why is the sky blue in the day and red in the evening?",
    "Describe a busy market in a town by the sea.",
    "What makes a good question in an interview for a job?",
)


class BenchmarkError(Exception):
    """The benchmark cannot measure what it should."""


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """One round of one mode at one number of streams.

    Attributes:
        tokens_per_second: Of all streams together, while all of them decode.
        zeros: [layers], share of act(gate) that was 0, in [0, 1].
    """

    tokens_per_second: float
    zeros: list[float]


@dataclass(frozen=True, slots=True)
class StreamsResult:
    """Both modes at one number of streams, all rounds.

    Attributes:
        streams: Sequences that decode at once.
        silu: Its rounds.
        relu: Its rounds.
    """

    streams: int
    silu: tuple[DecodeRun, ...]
    relu: tuple[DecodeRun, ...]

    @property
    def zeros(self) -> list[float]:
        """[layers], share of zeros in RELU mode over all rounds."""
        return [statistics.fmean(shares) for shares in zip(*(run.zeros for run in self.relu), strict=True)]

    @property
    def speedup(self) -> list[float]:
        """How many times as fast RELU is, by round."""
        return [b.tokens_per_second / a.tokens_per_second for a, b in zip(self.silu, self.relu, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {
            "streams": self.streams,
            "silu_tokens_per_second": spread([run.tokens_per_second for run in self.silu]),
            "relu_tokens_per_second": spread([run.tokens_per_second for run in self.relu]),
            "relu_speedup": spread(self.speedup, digits=3),
            "zeros": round(statistics.fmean(self.zeros), 4),
            "zeros_by_layer": [round(share, 4) for share in self.zeros],
        }


@contextmanager
def decoding(engine: Engine, prompts: Sequence[Sequence[int]], mode: ActivationMode) -> Iterator[None]:
    """One stream for each prompt. All have their first token when the block begins, and end with it."""
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    requests = [engine.check(str(place), prompt, sampling, Activation(mode)) for place, prompt in enumerate(prompts)]
    for request in requests:
        engine.add(request)
    try:
        waiting = {request.request_id for request in requests}
        while waiting:
            waiting -= {output.request_id for output in engine.step()}
        yield
    finally:
        for request in requests:
            engine.abort(request.request_id)


def compute(engine: Engine, streams: int, steps: int) -> float:
    """Seconds of some steps in which every stream gets a token.

    Raises:
        BenchmarkError: A stream did not get its token in each step.
    """
    before = engine.stats().generated_tokens
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    seconds = time.perf_counter() - start
    tokens = engine.stats().generated_tokens - before
    if tokens != steps * streams:
        raise BenchmarkError(
            f"{streams} streams gave {tokens} tokens in {steps} steps: the context "
            f"({engine.info.max_model_len} tokens) or the KV cache is too small for so many"
        )
    return seconds


def decode(engine: Engine, prompts: Sequence[Sequence[int]], mode: ActivationMode, steps: int) -> DecodeRun:
    """Time some steps of one mode and count their zeros.

    Raises:
        BenchmarkError: A stream did not get its token in each step.
    """
    with decoding(engine, prompts, mode):
        before = engine.stats()
        seconds = compute(engine, len(prompts), steps)
        after = engine.stats()
    return DecodeRun(steps * len(prompts) / seconds, list(zero_shares(before, after, mode)))


def run_end_to_end(
    engine: Engine, prompts: Sequence[Sequence[int]], streams: Sequence[int], steps: int, rounds: int
) -> list[StreamsResult]:
    """All numbers of streams in both modes, in turns.

    Args:
        engine: Has no other work.
        prompts: Token ids, as many as the largest number of streams.
        streams: Numbers of streams.
        steps: Steps that are timed.
        rounds: How often.
    """
    measured: dict[tuple[int, ActivationMode], list[DecodeRun]] = {
        (count, mode): [] for count in streams for mode in MODES
    }
    for number in range(rounds + 1):  # round 0 warms up
        for (count, mode), runs in measured.items():
            result = decode(engine, prompts[:count], mode, steps if number else WARM_UP_STEPS)
            if number:
                runs.append(result)
                print(
                    f"round {number}: {count:3} streams, {mode:4} {result.tokens_per_second:8.1f} tokens/s", flush=True
                )
    silu, relu = MODES
    return [StreamsResult(count, tuple(measured[count, silu]), tuple(measured[count, relu])) for count in streams]


def run_feed_forward(
    engine: Engine, prompts: Sequence[Sequence[int]], sizes: Sequence[int], steps: int, rounds: int
) -> list[RowsResult]:
    """The blocks alone, on rows of some steps in RELU mode.

    Args:
        engine: Has no other work.
        prompts: Token ids, as many as the largest number of rows.
        sizes: Numbers of rows at once.
        steps: Steps that are recorded.
        rounds: How often each number of rows is timed.
    """
    streams = max(sizes)
    with decoding(engine, prompts[:streams], ActivationMode.RELU), recording(engine) as recorder:
        compute(engine, streams, steps)
    results = []
    for rows in sizes:
        batches = [part for batch in recorder.batches for part in split(batch, rows)]
        results.append(RowsResult(rows, measure(recorder.backend, batches, rounds)))
        print(f"feed-forward blocks, {rows} rows at once: {len(batches)} batches, {rounds} rounds", flush=True)
    return results


def print_report(console: Console, end_to_end: Sequence[StreamsResult], feed_forward: Sequence[RowsResult]) -> None:
    """Print everything as tables."""
    table = _table("Decoding, tokens per second", "streams", "SILU", "RELU", "RELU / SILU", "zeros")
    for result in end_to_end:
        rates = (statistics.median(run.tokens_per_second for run in runs) for runs in (result.silu, result.relu))
        zeros = statistics.fmean(result.zeros)
        table.add_row(str(result.streams), *(f"{rate:.1f}" for rate in rates), _times(result.speedup), f"{zeros:.1%}")
    console.print(table)
    for case in feed_forward:
        title = f"Feed-forward block, rows at once: {case.rows}"
        table = _table(title, "layer", "zeros", "idle neurons", "SILU, µs", "RELU, µs", "RELU / SILU", "bound")
        for name, block in [*enumerate(case.layers), ("all", case.total)]:
            if name == "all":
                table.add_section()
            medians = (f"{statistics.median(values):.0f}" for values in (block.silu_us, block.relu_us))
            shares = (f"{share:.1%}" for share in (block.zeros, block.idle))
            table.add_row(str(name), *shares, *medians, _times(block.speedup), f"{block.bound:.2f}x")
        console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _times(speedup: Sequence[float]) -> str:
    return f"{statistics.median(speedup):.2f}x"


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.relu_speed", description=__doc__)
    parser.add_argument("--model", help="folder, name or GGUF file (default: the default model)")
    parser.add_argument("--adapter", metavar="FOLDER", help="LoRA adapter, or none (default: the default model's)")
    parser.add_argument("--allow-untuned", action="store_true", help="measure a model that was not tuned for RELU")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=64, help="tokens of each stream that are timed (default: 64)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], help="rows at once in feed-forward blocks")
    parser.add_argument("--recorded-steps", type=int, default=16, help="steps whose rows these are (default: 16)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plot", type=plot_path, metavar="FILE", help="also draw zeros and speed by layer")
    add_out_option(parser)
    options = parser.parse_args(arguments)
    for name in ("streams", "rows"):
        if not all(1 <= count <= len(PROMPTS) for count in getattr(options, name)):
            parser.error(f"--{name} must be from 1 to {len(PROMPTS)}, the number of prompts")
    for name in ("steps", "recorded_steps", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")

    config = EngineConfig(model=options.model, adapter=options.adapter, allow_untuned_activations=options.allow_untuned)
    try:
        engine = Engine(config, progress=print)
        if ActivationMode.RELU not in engine.info.support.modes and not options.allow_untuned:
            parser.error(f"{engine.info.name} is not tuned for RELU; --allow-untuned measures it all the same")
        prompts = [engine.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in PROMPTS]
        end_to_end = run_end_to_end(engine, prompts, options.streams, options.steps, options.rounds)
        feed_forward = run_feed_forward(engine, prompts, options.rows, options.recorded_steps, options.rounds)
    except (EngineError, BenchmarkError) as error:
        parser.error(str(error))
    print_report(Console(), end_to_end, feed_forward)
    results = {
        "end_to_end": [result.to_json() for result in end_to_end],
        "feed_forward": [result.to_json() for result in feed_forward],
    }
    print(f"Written to {save('relu-speed', _settings(engine, options), results, options.out)}")
    if options.plot:
        plot(feed_forward, options.plot)
        print(f"Drawn to {options.plot}")


def _settings(engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    info = engine.info
    return {
        "model": info.name,
        "adapter": info.adapter,
        "dtype": info.dtype,
        "tuned": info.support.tuned,
        "threads": info.threads,
        "kernels": info.kernels,
        "engine": {**asdict(engine.config), "model": None, "adapter": None},  # paths say nothing to others
        **{name: getattr(options, name) for name in ("streams", "steps", "rows", "recorded_steps", "rounds")},
    }


if __name__ == "__main__":
    main()
