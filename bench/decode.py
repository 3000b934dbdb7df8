"""The whole model in the engine, without HTTP: each quantisation, each mode, 1 to 32 streams, and what memory it takes.

Each quantisation runs in a process of its own, and within each round they take turns, so that a machine that changes
its clock favours none. Prompts are real, and decoding is greedy: zeros of RELU mode are those of the model at hand.
There is no case with a made-up share of zeros: real weights have the zeros that they have; `bench.ffn` has those.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.bandwidth import arrays_of, read_seconds
from bench.decode_plot import plot
from bench.peers_server import MIB, resident_memory
from bench.relu_speed import PROMPTS, BenchmarkError, compute, decoding
from bench.results import add_out_option, plot_path, save, spread
from bench.serving import running_server
from engine import Activation, ActivationMode, EngineConfig, EngineError, SamplingParams
from engine.config import Quantization
from engine.engine import Engine
from engine.kernels.cpu.backend import CpuBackend
from evaluation.sparsity import zero_shares

MODES = tuple(ActivationMode)
STREAMS = (1, 8, 32)
WARM_UP_STEPS = 4
READS = 3
TABLE_WIDTH = 120
MEMORY_STREAMS, MEMORY_PROMPT, MEMORY_OUTPUT = 32, 384, 128
# Other questions for the second half: equal ones would decode in step and use the same neurons.
QUESTIONS = (*PROMPTS, *(f"Answer with a poem. {text}" for text in PROMPTS))
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "decode.svg"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One process's part: one quantisation, every number of streams and mode once.

    Args:
        options: Those of the command line; `side` is the quantisation.

    Returns:
        `runs`, one for each number of streams and mode; `read_bytes_per_second`; `resident_mib` unless `no_memory`.
    """
    config = EngineConfig(
        model=options.model, quantize=options.side, threads=options.threads, allow_untuned_activations=True
    )
    engine = Engine(config)
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
    prompts = [engine.tokenizer.encode_chat(chat) for chat in chats]
    measured = {"model": engine.info.name, "dtype": engine.info.dtype, "threads": engine.info.threads}
    runs = []
    for count in options.streams:
        for mode in options.modes:
            with decoding(engine, prompts[:count], mode):
                compute(engine, count, WARM_UP_STEPS)
                before = engine.stats()
                seconds = compute(engine, count, options.steps)
                after = engine.stats()
            zeros = statistics.fmean(zero_shares(before, after, mode))
            skipping = after.ffn_rows["sparse"] > before.ffn_rows["sparse"]
            runs.append(
                {
                    "streams": count,
                    "mode": str(mode),
                    "tokens_per_second": count * options.steps / seconds,
                    "zeros": zeros,
                    "bytes": bytes_of_step(engine, zeros if skipping else 0.0) if count == 1 else None,
                }
            )
    measured |= {"runs": runs, "read_bytes_per_second": read_rate(engine)}
    if not options.no_memory:
        measured["resident_mib"] = resident_mib(engine)
    return measured


def _backend(engine: Engine) -> CpuBackend:
    backend = engine._runner.backend  # for this benchmark alone the engine is not worth a switch
    assert isinstance(backend, CpuBackend)
    return backend


def bytes_of_step(engine: Engine, skipped: float) -> float:
    """Bytes of weights that a step of one stream reads.

    Args:
        engine: Whose weights.
        skipped: Share of neurons whose `up` and `down` are not read, the mean over the layers.
    """
    backend = _backend(engine)
    layers, head = backend._arrays, backend._head
    all_bytes = sum(array.nbytes for array in arrays_of((layers, head)))
    skippable = sum(array.nbytes for array in arrays_of((layers.up, layers.down)))
    return all_bytes - skippable * skipped


def read_rate(engine: Engine) -> float:
    """Bytes per second of a plain read of the model's weights, the best of a few."""
    backend = _backend(engine)
    arrays = list(arrays_of((backend._arrays, backend._head)))
    return max(size / seconds for size, seconds in (read_seconds(arrays) for _ in range(READS)))


def resident_mib(engine: Engine) -> float | None:
    """Resident memory of this process after many sequences of 512 tokens at once; None if the system has no /proc."""
    words = range(100, min(engine.info.vocab_size, 10_000))
    prompts = [
        [words[(place * 31 + 7 * k) % len(words)] for k in range(MEMORY_PROMPT)] for place in range(MEMORY_STREAMS)
    ]
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=MEMORY_OUTPUT)
    for stream, prompt in enumerate(prompts):
        engine.add(engine.check(str(stream), prompt, sampling, Activation()))
    while engine.has_work:
        engine.step()
    resident = resident_memory(os.getpid())
    return None if resident is None else resident / MIB


async def seconds_to_ready(quantize: str, options: argparse.Namespace) -> float:
    """From the start of a server process to the first good answer of /health/ready."""
    arguments = [] if options.model is None else [options.model]
    arguments += ["--quantize", quantize, "--allow-untuned-activations"]
    arguments += [] if options.threads is None else ["--threads", str(options.threads)]
    start = time.perf_counter()
    async with running_server(*arguments):
        return time.perf_counter() - start


def run_side(quantize: str, options: argparse.Namespace, *, memory: bool) -> dict[str, Any]:
    """`measure` in a process of its own.

    Raises:
        BenchmarkError: It failed; its own words are on stderr.
    """
    command = [sys.executable, "-m", "bench.decode", "--side", quantize]
    command += ["--streams", *map(str, options.streams), "--modes", *options.modes, "--steps", str(options.steps)]
    command += [] if options.model is None else ["--model", options.model]
    command += [] if options.threads is None else ["--threads", str(options.threads)]
    command += [] if memory else ["--no-memory"]
    process = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise BenchmarkError(f"the process of {quantize} ended with status {process.returncode}")
    measured: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return measured


def run_rounds(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """All rounds of all quantisations, in turns. The first round's process leaves the caches warm for the server's.

    Returns:
        Quantisation -> what `measure` gives, by round, with `seconds_to_ready`.
    """
    measured: dict[str, list[dict[str, Any]]] = {quantize: [] for quantize in options.quantize}
    for number in range(1, options.rounds + 1):
        for quantize, rounds in measured.items():
            result = run_side(quantize, options, memory=number == 1 and not options.no_memory)
            if not options.no_ready:
                result["seconds_to_ready"] = asyncio.run(seconds_to_ready(quantize, options))
            rounds.append(result)
            print(f"round {number}: quantisation {quantize} done", flush=True)
    return measured


def summarise(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Medians of all rounds, one entry for each quantisation.

    Args:
        measured: Quantisation -> what `measure` gives, by round.
    """
    return [_summary(quantize, rounds) for quantize, rounds in measured.items()]


def _summary(quantize: str, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    read = [one["read_bytes_per_second"] for one in rounds]
    cases = [_case([one["runs"][place] for one in rounds], read) for place in range(len(rounds[0]["runs"]))]
    silu = {case["streams"]: case for case in cases if case["mode"] == ActivationMode.SILU}
    for place, case in enumerate(cases):
        if (base := silu.get(case["streams"])) is not None:
            own, theirs = (_rates(rounds, where) for where in (place, cases.index(base)))
            case["over_silu"] = spread([a / b for a, b in zip(own, theirs, strict=True)], digits=3)
    ready = [one["seconds_to_ready"] for one in rounds if "seconds_to_ready" in one]
    return {
        "quantize": quantize,
        "read_gb_per_s": spread([rate / 1e9 for rate in read]),
        "resident_mib": next((one["resident_mib"] for one in rounds if "resident_mib" in one), None),
        "seconds_to_ready": spread(ready) if ready else None,
        "cases": cases,
    }


def _rates(rounds: Sequence[Mapping[str, Any]], place: int) -> list[float]:
    return [one["runs"][place]["tokens_per_second"] for one in rounds]


def _case(runs: Sequence[Mapping[str, Any]], read: Sequence[float]) -> dict[str, Any]:
    """One number of streams and mode, all rounds."""
    streams, rates = runs[0]["streams"], [run["tokens_per_second"] for run in runs]
    case = {
        "streams": streams,
        "mode": runs[0]["mode"],
        "tokens_per_second": spread(rates),
        "step_ms": spread([1e3 * streams / rate for rate in rates], digits=3),
        "zeros": round(statistics.fmean(run["zeros"] for run in runs), 4),
    }
    if streams == 1:
        case["step_mb"] = round(statistics.fmean(run["bytes"] for run in runs) / 1e6, 2)
        shares = [run["bytes"] * run["tokens_per_second"] / rate for run, rate in zip(runs, read, strict=True)]
        case["bandwidth_share"] = spread(shares, digits=3)
    return case


def print_report(console: Console, results: Sequence[Mapping[str, Any]]) -> None:
    """Print everything as one table."""
    table = Table(title="Decoding, tokens per second", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in (
        "quantize",
        "streams",
        "mode",
        "tokens/s",
        "step, ms",
        "/ SILU",
        "zeros",
        "MB a step",
        "of plain read",
    ):
        table.add_column(column, justify="right")
    for result in results:
        for case in result["cases"]:
            table.add_row(
                result["quantize"],
                str(case["streams"]),
                case["mode"],
                f"{case['tokens_per_second']['median']:.1f}",
                f"{case['step_ms']['median']:.2f}",
                f"{case['over_silu']['median']:.2f}x" if "over_silu" in case else "",
                f"{case['zeros']:.1%}",
                f"{case['step_mb']:.0f}" if "step_mb" in case else "",
                f"{case['bandwidth_share']['median']:.0%}" if "bandwidth_share" in case else "",
            )
        table.add_section()
    console.print(table)
    for result in results:
        memory, ready = result["resident_mib"], result["seconds_to_ready"]
        said = [f"{result['quantize']}: plain read {result['read_gb_per_s']['median']:.1f} GB/s"]
        said += [] if memory is None else [f"{memory:.0f} MiB resident"]
        said += [] if ready is None else [f"ready after {ready['median']:.1f} s"]
        console.print(", ".join(said))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    parser.add_argument("--model", help="folder, name or GGUF file (default: the default model)")
    parser.add_argument("--quantize", nargs="+", choices=list(Quantization), default=list(Quantization))
    parser.add_argument("--modes", nargs="+", type=ActivationMode, choices=list(MODES), default=list(MODES))
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS))
    parser.add_argument("--steps", type=int, default=32, help="tokens of each stream that are timed (default: 32)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: one per core")
    parser.add_argument("--no-memory", action="store_true", help="leave out the run of 32 sequences of 512 tokens")
    parser.add_argument("--no-ready", action="store_true", help="leave out the starts of a server")
    parser.add_argument("--side", choices=list(Quantization), help="measure it once and print its figures as JSON")
    parser.add_argument(
        "--plot",
        type=plot_path,
        nargs="?",
        const=PICTURE,
        metavar="FILE",
        help=f"draw it (default FILE: {PICTURE.name})",
    )
    add_out_option(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not all(1 <= count <= len(QUESTIONS) for count in options.streams):
        parser.error(f"--streams must be from 1 to {len(QUESTIONS)}, the number of prompts")
    for name in ("steps", "rounds", "threads"):
        if (given := getattr(options, name)) is not None and given < 1:
            parser.error(f"--{name} must be at least 1")
    try:
        if options.side:
            print(json.dumps(measure(options)))
            return
        measured = run_rounds(options)
    except (EngineError, BenchmarkError) as error:
        parser.error(str(error))
    results = summarise(measured)
    print_report(Console(width=TABLE_WIDTH), results)
    first = next(iter(measured.values()))[0]
    settings = {name: first[name] for name in ("model", "dtype", "threads")}
    settings |= {name: getattr(options, name) for name in ("modes", "streams", "steps", "rounds")}
    print(f"Written to {save('decode', settings, results, options.out)}")
    if options.plot is not None:
        plot(results, options.plot)
        print(f"Drawn to {options.plot}")


if __name__ == "__main__":
    main()
