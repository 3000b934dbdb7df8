"""Whole-model decoding on a GPU, at the shapes of real models with random weights.

The engine's own runner computes the steps, sampling and routing included; only scheduler, text and HTTP are left out.
Weights are such that a share of the gate values is negative (`--zeros`): RELU's speed depends on nothing else, and text
is not looked at. All cases of a shape take turns within every round.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.decode_gpu_model import SHAPES, decoding_plan, random_checkpoint, start_sequences, step_bytes
from bench.results import add_out_option, save, spread
from engine.activation import MODES, Activation, ActivationMode
from engine.config import Device, EngineConfig, FfnPath, KernelSet
from engine.device import choose_device
from engine.errors import InvalidConfig
from engine.ffn_router import FfnRouter
from engine.kv_cache import blocks_for

if TYPE_CHECKING:
    from engine.runner import Runner

DEFAULT_SHAPES, BATCHES, TABLE_WIDTH = ("llama-1b", "llama-7b"), (1, 8, 64), 120
# What the project wants of batch 1: a share of the bandwidth bound, and times as fast as SILU.
SILU_TARGET, RELU_TARGET, RELU_TARGET_SHAPE = 0.75, 1.4, "llama-7b"


@dataclass(slots=True)
class Case:
    """One batch size, mode and path.

    Attributes:
        path: Of RELU rows; `auto` is the router's choice.
        zeros: Share of zeros that the kernels counted in this mode.
        tokens: Of sequence 0 in the first round.
        seconds: Of one step, by round.
    """

    batch: int
    mode: ActivationMode
    path: FfnPath
    zeros: float = 0.0
    routed: str | None = None
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Measured:
    """All of one shape. `read` is a plain read's bytes per second, by round; nothing where nothing is timed."""

    shape: str
    itemsize: int
    context: int
    cases: list[Case]
    read: list[float]


def cases_of(batches: Sequence[int], modes: Sequence[ActivationMode]) -> list[Case]:
    """Every batch size and mode; RELU routed, and by either path."""
    paths = dict.fromkeys(ActivationMode, (FfnPath.AUTO,)) | {ActivationMode.RELU: tuple(FfnPath)}
    return [Case(batch, mode, path) for batch in batches for mode in modes for path in paths[mode]]


def measure(shape: str, options: argparse.Namespace, device: torch.device) -> Measured:
    """Run all rounds of one shape."""
    from engine.runner import Runner

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    checkpoint = random_checkpoint(shape, options.zeros, dtype, device)
    most, longest = max(options.batches), options.context + options.steps
    config = EngineConfig(
        device=Device(device.type),
        kernels=KernelSet.TRITON,
        max_num_seqs=most,
        max_num_batched_tokens=max(most, 16),
        ffn_path=FfnPath.AUTO,
        allow_untuned_activations=True,
    )
    blocks = most * blocks_for(longest)
    runner = Runner(checkpoint, config, device, blocks, blocks_for(longest) * 16, lambda line: print(line, flush=True))
    generator = torch.Generator(device).manual_seed(1)
    for cache in (runner.cache.keys, runner.cache.values):
        cache.normal_(0, 1, generator=generator)
    cases, read = cases_of(options.batches, options.modes), list[float]()
    auto = runner.router
    routers = {path: auto if path is FfnPath.AUTO else FfnRouter(path, lambda: None) for path in FfnPath}
    for number in range(options.rounds):
        if device.type == "cuda":
            read.append(_read_rate(runner, device))
        for case in cases:
            runner.router = routers[case.path]
            _run(runner, case, options, first=number == 0)
        print(f"{shape}: round {number + 1} done", flush=True)
    return Measured(shape, dtype.itemsize, options.context, cases, read)


def _read_rate(runner: "Runner", device: torch.device) -> float:
    """Bytes per second of a kernel that only reads the weights of all layers."""
    from bench.gpu import PlainRead
    from engine.kernels.triton.timing import seconds

    weights = runner.backend.weights.stacked
    plain = PlainRead([weights.gate, weights.up, weights.down, weights.qkv, weights.o])
    return plain.bytes / seconds(plain, device)


def _run(runner: "Runner", case: Case, options: argparse.Namespace, *, first: bool) -> None:
    """Decode `steps` tokens of every sequence, after two steps that are not timed."""
    config = runner.backend.config
    p = options.p if case.mode is ActivationMode.STOCHASTIC else None
    sequences = start_sequences(config, case.batch, options.context, options.steps, Activation(case.mode, p=p))
    if runner.cache.keys.is_cuda:
        for _ in range(2):  # written again by the steps that count
            runner.run(decoding_plan(sequences))
    runner.backend.sparsity.reset()
    before = dict(runner.ffn_rows)
    start = time.perf_counter()
    for _ in range(options.steps):
        for sequence, token in zip(sequences, runner.run(decoding_plan(sequences)).tokens, strict=True):
            assert token is not None, "logits of random weights are finite"
            sequence.token_ids.append(token.token_id)
    case.seconds.append((time.perf_counter() - start) / options.steps)
    if first:
        zeros, elements = runner.backend.sparsity.share(case.mode)
        case.zeros, case.tokens = zeros / elements, sequences[0].token_ids[options.context :]
        if case.mode is ActivationMode.RELU:
            case.routed = max(before, key=lambda path: runner.ffn_rows[path] - before[path])


def summarise(measured: Measured) -> list[dict[str, Any]]:
    """All cases as JSON values; figures of time are null if nothing was timed."""
    silu = {case.batch: case for case in measured.cases if case.mode is ActivationMode.SILU}
    smallest = min(case.batch for case in measured.cases)
    alone = {case.mode: case.tokens for case in measured.cases if case.batch == smallest}
    return [_summary(measured, case, silu.get(case.batch), alone.get(case.mode)) for case in measured.cases]


def _summary(measured: Measured, case: Case, silu: Case | None, alone: list[int] | None) -> dict[str, Any]:
    timed = bool(measured.read)
    # In a batch, idle is what no row needs, which is not counted.
    skips = case.routed == "sparse"
    share = None
    if timed and (case.batch == 1 or not skips):
        idle = case.zeros if skips else 0.0
        size = step_bytes(SHAPES[measured.shape], case.batch, measured.context, measured.itemsize, idle)
        rates = zip(case.seconds, measured.read, strict=True)
        share = spread([size / seconds / rate for seconds, rate in rates], digits=3)
    return {
        "shape": measured.shape,
        "batch": case.batch,
        "mode": str(case.mode),
        "path": str(case.path) if case.mode is ActivationMode.RELU else None,
        "routed": case.routed,
        "zeros": round(case.zeros, 4),
        "same_tokens_as_in_the_smallest_batch": case.tokens == alone,
        "tokens_per_second": spread([case.batch / seconds for seconds in case.seconds]) if timed else None,
        "step_ms": spread([1e3 * seconds for seconds in case.seconds], digits=3) if timed else None,
        "over_silu": spread([a / b for a, b in zip(silu.seconds, case.seconds, strict=True)], digits=3)
        if timed and silu is not None
        else None,
        "bandwidth_share": share,
    }


def verdicts(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the project wants, and what was measured."""
    lines = []
    for case in results:
        if case["batch"] != 1 or case["step_ms"] is None:
            continue
        if case["mode"] == ActivationMode.SILU:
            found, wanted, what = case["bandwidth_share"]["median"], SILU_TARGET, "SILU, share of the bandwidth bound"
        elif case["shape"] == RELU_TARGET_SHAPE and case["path"] == FfnPath.AUTO and case["over_silu"]:
            found, wanted, what = case["over_silu"]["median"], RELU_TARGET, "RELU over SILU"
        else:
            continue
        verdict = "met" if found >= wanted else "NOT met"
        lines.append(f"{case['shape']}, {what}: {found:.2f}, wanted {wanted}: {verdict}")
    return lines


def print_report(console: Console, results: Sequence[Mapping[str, Any]]) -> None:
    """Print everything as one table, and what of it was wanted."""
    table = Table(title="Decoding on a GPU", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in ("shape", "batch", "mode", "path", "zeros", "same tokens", "tokens/s", "step, ms", "/ SILU", "bound"):
        table.add_column(column, justify="right")
    for case in results:
        table.add_row(
            case["shape"],
            str(case["batch"]),
            case["mode"],
            f"{case['path']}: {case['routed']}" if case["path"] else "",
            f"{case['zeros']:.1%}",
            "yes" if case["same_tokens_as_in_the_smallest_batch"] else "NO",
            *(
                form.format(case[name]["median"]) if case[name] else ""
                for name, form in (
                    ("tokens_per_second", "{:.0f}"),
                    ("step_ms", "{:.2f}"),
                    ("over_silu", "{:.2f}x"),
                    ("bandwidth_share", "{:.0%}"),
                )
            ),
        )
    console.print(table)
    for line in verdicts(results):
        console.print(line)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode_gpu", description=__doc__)
    parser.add_argument(
        "--device",
        type=Device,
        choices=[Device.CUDA, Device.CPU],
        default=Device.CUDA,
        help="cpu: Triton's interpreter, no times",
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: llama-1b llama-7b; on the cpu tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--modes", type=ActivationMode, nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence in the cache (default: 512)")
    parser.add_argument("--steps", type=int, default=64, help="tokens of each sequence that are timed (default: 64)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--zeros", type=float, default=0.9, help="share of negative gate values (default: 0.9)")
    parser.add_argument("--p", type=float, default=0.5, help="of stochastic mode (default: 0.5)")
    add_out_option(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name in ("context", "steps", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if min(options.batches) < 1:
        parser.error("--batches must be at least 1")
    if not 0 < options.zeros < 1:
        parser.error("--zeros must be between 0 and 1")
    if not 0 <= options.p <= 1:
        parser.error("--p must be in [0, 1]")
    try:
        device = choose_device(EngineConfig(device=options.device, kernels=KernelSet.TRITON))
    except InvalidConfig as error:
        parser.error(str(error))
    from bench.gpu import describe_device

    results: list[dict[str, Any]] = []
    for shape in options.shapes or (DEFAULT_SHAPES if device.type == "cuda" else ("tiny",)):
        results += summarise(measure(shape, options, device))
    print_report(Console(width=TABLE_WIDTH), results)
    settings = {name: getattr(options, name) for name in ("batches", "context", "steps", "rounds", "zeros", "p")}
    settings |= {"dtype": "bfloat16" if device.type == "cuda" else "float32"}
    path = save("decode-gpu", settings, results, options.out, describe_device(device))
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
