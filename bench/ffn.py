"""The whole gated feed-forward block alone, at the shapes of real models: the engine's kernels against PyTorch's.

PyTorch's block is dense and bfloat16, whatever the engine's weights are. It, the engine's dense path with SILU rows and
its sparse path with RELU rows of each share of zeros take turns within every round, with a plain read of the same
weights, so that a machine that changes its clock favours no side.
"""

import argparse
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.bandwidth import read_seconds
from bench.ffn_block import CONSTANT, OurBlock, Rows, Shape, TorchBlock, Weights, copies_for
from bench.ffn_plot import plot
from bench.results import add_out_option, plot_path, save, spread
from engine.config import FfnPath
from engine.ffn_router import HIGH_ZEROS, LOW_ZEROS, MEASURED_ROWS, FfnCosts, FfnRouter
from engine.kernels.cpu.formats import Format
from engine.kernels.cpu.isa import has_amx
from engine.threads import use_threads

MODELS = {
    Shape(576, 1536): "SmolLM2-135M",
    Shape(2048, 8192): "1.5B",
    Shape(3072, 8192): "Llama-3.2-3B",
    Shape(4096, 11008): "Llama-2-7B",
}
FORMATS = {"bf16": Format.FLOAT, "int8": Format.INT8}
ZEROS = (0, 50, 72, 80, 85, 90, 95, 99)  # per cent
ROWS = (1, 2, 4, 8, 16, 32)
COST_ROUNDS = 3
TABLE_WIDTH = 120
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "ffn.svg"
DRAWN = Shape(2048, 8192)


@dataclass(frozen=True, slots=True)
class SparseCell:
    """The sparse path at one share of zeros.

    Attributes:
        wanted: Share of zeros that was asked for, in [0, 1].
        zeros: Share of zeros that the kernels counted.
        idle: Share of neurons that no row of a batch uses.
        routed: The path that the router would choose, `"sparse"` or `"dense"`.
        bytes: Bytes of one block's weights that are read.
        seconds: Of one block, by round.
    """

    wanted: float
    zeros: float
    idle: float
    routed: str
    bytes: float
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Case:
    """One shape, format and number of rows.

    Attributes:
        shape: Of the block.
        format: Key of `FORMATS`.
        rows: Token rows at once.
        bytes: Bytes of one block's weights in this format.
        read: Bytes per second of a plain read, by round; likewise seconds of one block:
        torch: PyTorch's, dense, bfloat16.
        dense: The engine's dense path, SILU rows.
        sparse: The engine's sparse path, RELU rows, one entry for each share of zeros.
    """

    shape: Shape
    format: str
    rows: int
    bytes: float
    sparse: tuple[SparseCell, ...]
    read: list[float] = field(default_factory=list)
    torch: list[float] = field(default_factory=list)
    dense: list[float] = field(default_factory=list)

    def routed(self, cell: SparseCell) -> list[float]:
        """Seconds of the path that the router chooses, by round."""
        return cell.seconds if cell.routed == "sparse" else self.dense

    def speedup(self, seconds: Sequence[float]) -> list[float]:
        """How many times as fast as PyTorch, by round."""
        return ratios(self.torch, seconds)

    def share(self, size: float, seconds: Sequence[float]) -> list[float]:
        """Bytes of weights read per second over those of a plain read, by round."""
        return [size / time / rate for time, rate in zip(seconds, self.read, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {
            "shape": str(self.shape),
            "format": self.format,
            "rows": self.rows,
            "read_gb_per_s": spread([rate / 1e9 for rate in self.read]),
            "torch_us": _microseconds(self.torch),
            "dense_us": _microseconds(self.dense),
            "dense_over_torch": spread(self.speedup(self.dense), digits=3),
            "dense_bandwidth_share": spread(self.share(self.bytes, self.dense), digits=3),
            "sparse": [self._cell(cell) for cell in self.sparse],
        }

    def _cell(self, cell: SparseCell) -> dict[str, Any]:
        routed = self.routed(cell)
        return {
            "wanted": cell.wanted,
            "zeros": round(cell.zeros, 4),
            "idle": round(cell.idle, 4),
            "sparse_us": _microseconds(cell.seconds),
            "sparse_over_torch": spread(self.speedup(cell.seconds), digits=3),
            "sparse_over_dense": spread(ratios(self.dense, cell.seconds), digits=3),
            "sparse_bandwidth_share": spread(self.share(cell.bytes, cell.seconds), digits=3),
            "routed": cell.routed,
            "routed_over_torch": spread(self.speedup(routed), digits=3),
            "routed_over_dense": spread(ratios(self.dense, routed), digits=3),
        }


def ratios(base: Sequence[float], own: Sequence[float]) -> list[float]:
    """How many times as fast, by round."""
    return [theirs / ours for theirs, ours in zip(base, own, strict=True)]


def _microseconds(seconds: Sequence[float]) -> dict[str, float]:
    return spread([1e6 * value for value in seconds])


def measure_costs(block: OurBlock, rows: Rows, count: int) -> FfnCosts:
    """What the router would measure at this number of rows, in every entry: it is asked about no other number."""
    low, high = rows.with_zeros(LOW_ZEROS), rows.with_zeros(HIGH_ZEROS)
    turns = [
        (block.seconds(low, sparse=False), block.seconds(low, sparse=True), block.seconds(high, sparse=True))
        for _ in range(COST_ROUNDS)
    ]
    return FfnCosts(*((statistics.median(side),) * count for side in zip(*turns, strict=True)))


def measure(
    weights: Weights,
    name: str,
    counts: Sequence[int],
    zeros: Sequence[float],
    rounds: int,
    copies: int | None = None,
    theirs: TorchBlock | None = None,
) -> list[Case]:
    """One shape in one format.

    Args:
        weights: The block's.
        name: Key of `FORMATS`.
        counts: Numbers of rows.
        zeros: Shares of zeros, in [0, 1].
        rounds: Turns of each side.
        copies: Of the engine's weights; as many as are larger than a cache if None.
        theirs: PyTorch's block; a new one if None.

    Returns:
        One case for each number of rows.
    """
    shape, kind = Shape(weights.gate.shape[1], weights.gate.shape[0]), FORMATS[name]
    copies = copies_for(shape, kind) if copies is None else copies
    if theirs is None:
        theirs = TorchBlock(weights, min(copies, copies_for(shape, Format.FLOAT)))
    ours = OurBlock(weights, kind, copies, max(counts))
    cases = []
    for count in counts:
        rows = Rows(weights, count, copies)
        router = FfnRouter(FfnPath.AUTO, lambda rows=rows: measure_costs(ours, rows, len(MEASURED_ROWS)))  # type: ignore[misc]
        inputs = {share: rows.with_zeros(share) for share in zeros}
        cells = []
        for share, x in inputs.items():
            _, counted = ours.sweep(x, sparse=True)
            idle = rows.idle(share)
            path = "sparse" if router.skips(count, count, share) else "dense"
            cells.append(SparseCell(share, counted, idle, path, ours.bytes_read(idle)))
        case = Case(shape, name, count, ours.bytes_read(0.0), tuple(cells))
        dense = next(iter(inputs.values()))
        narrow = dense[: len(theirs.gate)].bfloat16()
        for _ in range(rounds):
            size, seconds = read_seconds(ours.arrays)
            case.read.append(size / seconds)
            case.torch.append(theirs.seconds(narrow))
            case.dense.append(ours.seconds(dense, sparse=False, relu=False))
            for cell in cells:
                cell.seconds.append(ours.seconds(inputs[cell.wanted], sparse=True))
        cases.append(case)
        print(f"{shape} {name}: {count} rows at once, {copies} copies, {rounds} rounds", flush=True)
    return cases


def run(
    shapes: Sequence[Shape], formats: Sequence[str], counts: Sequence[int], zeros: Sequence[float], rounds: int
) -> list[Case]:
    """All shapes, formats and numbers of rows."""
    cases = []
    for shape in shapes:
        weights = Weights.random(shape)
        theirs = TorchBlock(weights, copies_for(shape, Format.FLOAT))
        for name in formats:
            cases += measure(weights, name, counts, zeros, rounds, theirs=theirs)
    return cases


def print_report(console: Console, cases: Sequence[Case]) -> None:
    """Print one table for each shape and format: times as fast as PyTorch's dense bfloat16 block."""
    for shape, name in dict.fromkeys((case.shape, case.format) for case in cases):
        own = [case for case in cases if (case.shape, case.format) == (shape, name)]
        read = statistics.median(rate for case in own for rate in case.read) / 1e9
        title = f"{shape} {name}, times as fast as torch bf16 dense; plain read {read:.1f} GB/s"
        table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
        zeros = [f"{cell.wanted:.0%}" for cell in own[0].sparse]
        for column in ("rows", "torch, µs", "dense, µs", "of read", "dense", *zeros):
            table.add_column(column, justify="right")
        for case in own:
            table.add_row(
                str(case.rows),
                f"{1e6 * statistics.median(case.torch):.0f}",
                f"{1e6 * statistics.median(case.dense):.0f}",
                f"{statistics.median(case.share(case.bytes, case.dense)):.0%}",
                f"{statistics.median(case.speedup(case.dense)):.2f}",
                *(_cell_text(case, cell) for cell in case.sparse),
            )
        console.print(table)
    console.print("A star: the router would take the dense path instead.")


def _cell_text(case: Case, cell: SparseCell) -> str:
    return f"{statistics.median(case.speedup(cell.seconds)):.2f}{'*' if cell.routed == 'dense' else ''}"


def shape_of(text: str) -> Shape:
    """A shape from the command line."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be HIDDENxINTERMEDIATE, such as {DRAWN}, got {text!r}")
    shape = Shape(int(match[1]), int(match[2]))
    if shape.hidden % 64 or shape.intermediate % 64 or shape.hidden <= CONSTANT or not shape.intermediate:
        raise argparse.ArgumentTypeError(f"must be multiples of 64, hidden more than {CONSTANT}, got {text!r}")
    return shape


def share_of(text: str) -> float:
    """A share of zeros from the command line, where it is per cent."""
    try:
        per_cent = float(text)
    except ValueError:
        per_cent = -1.0
    if not 0 <= per_cent <= 100:
        raise argparse.ArgumentTypeError(f"must be per cent from 0 to 100, got {text!r}")
    return per_cent / 100


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.ffn", description=__doc__)
    parser.add_argument(
        "--shape",
        type=shape_of,
        nargs="+",
        default=list(MODELS),
        metavar="HIDDENxINTERMEDIATE",
        help=f"default: {' '.join(map(str, MODELS))}",
    )
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS), help="of the engine's weights")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help=f"default: {' '.join(map(str, ROWS))}")
    parser.add_argument(
        "--zeros",
        type=share_of,
        nargs="+",
        default=[share / 100 for share in ZEROS],
        metavar="PERCENT",
        help=f"default: {' '.join(map(str, ZEROS))}",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: one per core")
    parser.add_argument(
        "--plot",
        type=plot_path,
        nargs="?",
        const=PICTURE,
        metavar="FILE",
        help=f"draw {DRAWN} (default FILE: {PICTURE.name})",
    )
    add_out_option(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name in ("rows", "rounds", "threads"):
        given = getattr(options, name)
        if given is not None and min(given if isinstance(given, list) else [given]) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.plot is not None and DRAWN not in options.shape:
        parser.error(f"--plot draws {DRAWN}, which --shape leaves out")
    threads = use_threads(options.threads)
    cases = run(options.shape, options.format, options.rows, options.zeros, options.rounds)
    print_report(Console(width=TABLE_WIDTH), cases)
    settings = {
        "shapes": {str(shape): MODELS.get(shape) for shape in options.shape},
        "formats": options.format,
        "rows": options.rows,
        "zeros": options.zeros,
        "rounds": options.rounds,
        "threads": threads,
        "amx": has_amx(),
    }
    print(f"Written to {save('ffn', settings, [case.to_json() for case in cases], options.out)}")
    if options.plot is not None:
        plot([case.to_json() for case in cases if case.shape == DRAWN], options.plot)
        print(f"Drawn to {options.plot}")


if __name__ == "__main__":
    main()
