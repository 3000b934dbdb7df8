"""The whole gated feed-forward block on a GPU: the engine's kernels, dense and with skipped zeros, against PyTorch's.

All sides are CUDA graphs of the same sweep over copies of bfloat16 weights, timed by the device, and take turns within
every round. PyTorch's side is dense, with cuBLAS: three products, and two with gate and up in one. RELU rows have the
wanted number of zeros; in a batch their zeros are independent, or correlated.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.ffn import MODELS, ratios, shape_of, share_of
from bench.ffn_block import Rows, Shape, TorchBlock, Weights
from bench.results import add_out_option, save, spread
from engine.config import FfnPath
from engine.ffn_router import HIGH_ZEROS, LOW_ZEROS, MEASURED_ROWS, FfnCosts, FfnRouter

if TYPE_CHECKING:
    from bench.ffn_gpu_block import TritonBlock

SHAPES = (Shape(2048, 8192), Shape(4096, 11008))
ZEROS = (80, 90, 95, 99)  # per cent
ROWS = (1, 2, 4, 8, 16)
CORRELATIONS = {"independent": 0.0, "correlated": 0.9}
ROUNDS = 9
TABLE_WIDTH = 120
# What the project wants: times as fast as the faster of PyTorch's two, by shape and share of zeros, for one row.
TARGETS = {(Shape(4096, 11008), 0.9): 1.8, (Shape(4096, 11008), 0.95): 2.1}
ROUTED_TARGET = 0.98


@dataclass(frozen=True, slots=True)
class SparseCell:
    """The sparse path at one share of zeros.

    Attributes:
        wanted: Share of zeros that was asked for, in [0, 1].
        zeros: Share of zeros that the kernels counted.
        idle: Share of neurons that no row of a batch uses.
        routed: The path that the router would choose, `"sparse"` or `"dense"`; None without times.
        bytes: Bytes of one block's weights that are read.
        error: Largest difference from the definition, over the largest output.
        same_bits: The dense path gave the very same output.
        seconds: Of one block, by round.
    """

    wanted: float
    zeros: float
    idle: float
    routed: str | None
    bytes: float
    error: float
    same_bits: bool
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Case:
    """One shape, number of rows and kind of batch.

    Attributes:
        shape: Of the block.
        rows: Token rows at once.
        batch: Key of `CORRELATIONS`.
        bytes: Bytes of one block's weights.
        sparse: One entry for each share of zeros.
        read: Bytes per second of a plain read, by round; likewise seconds of one block:
        torch: PyTorch's with three products.
        torch_fused: PyTorch's with gate and up in one product.
        dense: The engine's dense path.
    """

    shape: Shape
    rows: int
    batch: str
    bytes: float
    sparse: tuple[SparseCell, ...]
    read: list[float] = field(default_factory=list)
    torch: list[float] = field(default_factory=list)
    torch_fused: list[float] = field(default_factory=list)
    dense: list[float] = field(default_factory=list)

    @property
    def peer(self) -> list[float]:
        """Seconds of PyTorch's faster block, by round."""
        return list(map(min, self.torch, self.torch_fused))

    def routed(self, cell: SparseCell) -> list[float]:
        """Seconds of the path that the router chooses, by round."""
        return cell.seconds if cell.routed == "sparse" else self.dense

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values; those of time are null if nothing was timed."""
        return {
            "shape": str(self.shape),
            "rows": self.rows,
            "batch": self.batch,
            "read_gb_per_s": _spread([rate / 1e9 for rate in self.read]),
            "torch_us": _microseconds(self.torch),
            "torch_fused_us": _microseconds(self.torch_fused),
            "torch_bandwidth_share": self._share(self.bytes, self.peer),
            "dense_us": _microseconds(self.dense),
            "dense_over_torch": _spread(ratios(self.peer, self.dense)),
            "dense_bandwidth_share": self._share(self.bytes, self.dense),
            "sparse": [self._cell(cell) for cell in self.sparse],
        }

    def _cell(self, cell: SparseCell) -> dict[str, Any]:
        routed = self.routed(cell)
        return {
            "wanted": cell.wanted,
            "zeros": round(cell.zeros, 4),
            "idle": round(cell.idle, 4),
            "error": cell.error,
            "same_bits_as_dense": cell.same_bits,
            "sparse_us": _microseconds(cell.seconds),
            "sparse_over_torch": _spread(ratios(self.peer, cell.seconds)),
            "sparse_over_dense": _spread(ratios(self.dense, cell.seconds)),
            "sparse_bandwidth_share": self._share(cell.bytes, cell.seconds),
            "routed": cell.routed,
            "routed_over_torch": _spread(ratios(self.peer, routed)),
            "routed_over_dense": _spread(ratios(self.dense, routed)),
        }

    def _share(self, size: float, seconds: Sequence[float]) -> dict[str, float] | None:
        return _spread([size / time / rate for time, rate in zip(seconds, self.read, strict=True)])


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    return spread(values, digits=3) if values else None


def _microseconds(seconds: Sequence[float]) -> dict[str, float] | None:
    return _spread([1e6 * value for value in seconds])


def targets(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What the project wants beside what was measured; nothing without times."""
    found = []
    for case in cases:
        for cell in case.sparse if case.torch else ():
            where = f"{case.shape}, {case.rows} {case.batch} rows, {cell.wanted:.0%} zeros"
            routed = statistics.median(ratios(case.peer, case.routed(cell)))
            found.append({"what": f"routed over torch, {where}", "wanted": ROUTED_TARGET, "found": round(routed, 3)})
            wanted = TARGETS.get((case.shape, round(cell.wanted, 4)))
            if wanted is not None and case.rows == 1:
                sparse = statistics.median(ratios(case.peer, cell.seconds))
                found.append({"what": f"sparse over torch, {where}", "wanted": wanted, "found": round(sparse, 3)})
    return found


def measure(
    weights: Weights,
    device: torch.device,
    count: int,
    batch: str,
    zeros: Sequence[float],
    *,
    rounds: int,
    copies: int,
) -> Case:
    """One shape, number of rows and kind of batch.

    Args:
        weights: The block's, in the CPU's memory.
        device: Where to measure.
        count: Token rows at once.
        batch: Key of `CORRELATIONS`.
        zeros: Shares of zeros, in [0, 1].
        rounds: Turns of each side; nothing is timed if 0.
        copies: Of the weights.
    """
    from bench.ffn_gpu_block import TritonBlock, reference

    shape = Shape(weights.gate.shape[1], weights.gate.shape[0])
    own = Weights(weights.gate.to(device), weights.up.to(device), weights.down.to(device))
    rows = Rows(weights, count, copies, CORRELATIONS[batch])
    inputs = {share: rows.with_zeros(share).to(device, torch.bfloat16) for share in zeros}
    ours = TritonBlock(own, copies, count)
    router = None
    if rounds:
        costs = _measure_costs(ours, Rows(weights, count, copies), device)
        router = FfnRouter(FfnPath.AUTO, lambda: costs)
    cells = []
    for share, x in inputs.items():
        expected = reference(own, x[-1])
        sparse, dense = (ours.outcome(x, sparse=path) for path in (True, False))
        idle = rows.idle(share)
        cells.append(
            SparseCell(
                wanted=share,
                zeros=sparse.zeros,
                idle=idle,
                routed=None if router is None else "sparse" if router.skips(count, count, share) else "dense",
                bytes=ours.bytes_read(idle),
                error=((sparse.out - expected).abs().max() / expected.abs().max()).item(),
                same_bits=torch.equal(sparse.out, dense.out),
            )
        )
    case = Case(shape, count, batch, ours.bytes, tuple(cells))
    if rounds:
        _time(case, ours, own, inputs, rounds, copies)
    return case


def _time(
    case: Case, ours: "TritonBlock", weights: Weights, inputs: dict[float, Tensor], rounds: int, copies: int
) -> None:
    """Fill in the times: all sides in turn, `rounds` times."""
    from bench.ffn_gpu_block import TorchFusedBlock
    from bench.gpu import PlainRead
    from engine.kernels.triton.timing import captured, seconds

    device = weights.gate.device
    x = next(iter(inputs.values()))
    plain, fused = TorchBlock(weights, copies), TorchFusedBlock(weights, copies)
    read = PlainRead([ours.gate, ours.up, ours.down])
    sides: list[tuple[list[float], Callable[[], object]]] = [
        (case.torch, partial(plain.sweep, x)),
        (case.torch_fused, partial(fused.sweep, x)),
        (case.dense, partial(ours.sweep, x, sparse=False)),
    ]
    sides += [(cell.seconds, partial(ours.sweep, inputs[cell.wanted], sparse=True)) for cell in case.sparse]
    graphs = [(times, captured(call, device)) for times, call in sides]
    read_graph = captured(read, device)
    for _ in range(rounds):
        case.read.append(read.bytes / seconds(read_graph, device))
        for times, graph in graphs:
            times.append(seconds(graph, device) / copies)


def _measure_costs(ours: "TritonBlock", rows: Rows, device: torch.device) -> FfnCosts:
    """What the router would measure at this number of independent rows, in every entry: it is asked no other."""
    from engine.kernels.triton.timing import median_seconds

    low, high = (rows.with_zeros(share).to(device, torch.bfloat16) for share in (LOW_ZEROS, HIGH_ZEROS))
    turns = ((low, False), (low, True), (high, True))
    times = [median_seconds(partial(ours.sweep, x, sparse=sparse), device, ROUNDS) for x, sparse in turns]
    return FfnCosts(*((seconds / len(low),) * len(MEASURED_ROWS) for seconds in times))


def run(
    shapes: Sequence[Shape],
    counts: Sequence[int],
    zeros: Sequence[float],
    rounds: int,
    device: torch.device,
    copies: int | None = None,
) -> list[Case]:
    """All shapes, numbers of rows and kinds of batch; a single row has no other to be correlated with.

    Args:
        shapes: Of blocks.
        counts: Token rows at once.
        zeros: Shares of zeros, in [0, 1].
        rounds: Turns of each side; nothing is timed if 0.
        device: Where to measure.
        copies: Of the weights; as many as are larger than a cache if None.
    """
    from bench.ffn_gpu_block import copies_for

    cases = []
    for shape in shapes:
        weights = Weights.random(shape)
        number = copies_for(shape) if copies is None else copies
        for count in counts:
            for batch in CORRELATIONS if count > 1 else ("independent",):
                cases.append(measure(weights, device, count, batch, zeros, rounds=rounds, copies=number))
                print(f"{shape}: {count} {batch} rows, {number} copies, {rounds} rounds", flush=True)
    return cases


def print_report(console: Console, cases: Sequence[Case]) -> None:
    """Print one table for each shape: correctness, and times as fast as PyTorch's faster block."""
    for shape in dict.fromkeys(case.shape for case in cases):
        own = [case for case in cases if case.shape == shape]
        rates = [rate for case in own for rate in case.read]
        title = f"{shape} bf16, times as fast as torch (cuBLAS)"
        if rates:
            title += f"; plain read {statistics.median(rates) / 1e9:.0f} GB/s"
        table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
        zeros = [f"{cell.wanted:.0%}" for cell in own[0].sparse]
        for column in ("rows", "torch, µs", "dense", "of read", *zeros, "error", "bits"):
            table.add_column(column, justify="right")
        for case in own:
            table.add_row(
                f"{case.rows} {case.batch}",
                _median(case.peer, 1e6, ".1f"),
                _median(ratios(case.peer, case.dense), 1, ".2f"),
                _median(
                    [case.bytes / time / rate for time, rate in zip(case.dense, case.read, strict=True)], 100, ".0f%"
                ),
                *(
                    _median(ratios(case.peer, cell.seconds), 1, ".2f") + ("*" if cell.routed == "dense" else "")
                    for cell in case.sparse
                ),
                f"{max(cell.error for cell in case.sparse):.4f}",
                "same" if all(cell.same_bits for cell in case.sparse) else "differ",
            )
        console.print(table)
    console.print("A star: the router would take the dense path instead. bits: of the sparse path and the dense one.")
    for target in targets(cases):
        verdict = "reached" if target["found"] >= target["wanted"] else "missed"
        console.print(f"{verdict}: {target['what']}: {target['found']}, wanted {target['wanted']}", highlight=False)


def _median(values: Sequence[float], factor: float, form: str) -> str:
    if not values:
        return "-"
    return f"{factor * statistics.median(values):{form.rstrip('%')}}{'%' if form.endswith('%') else ''}"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.ffn_gpu", description=__doc__)
    parser.add_argument(
        "--shape",
        type=shape_of,
        nargs="+",
        default=list(SHAPES),
        metavar="HIDDENxINTERMEDIATE",
        help=f"default: {' '.join(map(str, SHAPES))}",
    )
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help=f"default: {' '.join(map(str, ROWS))}")
    parser.add_argument(
        "--zeros",
        type=share_of,
        nargs="+",
        default=[share / 100 for share in ZEROS],
        metavar="PERCENT",
        help=f"default: {' '.join(map(str, ZEROS))}",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: in Triton's interpreter, with TRITON_INTERPRET=1 and small shapes; checks results and times nothing",
    )
    add_out_option(parser)
    return parser


def check_device(name: str) -> torch.device:
    """The device, if it can be measured.

    Raises:
        SystemExit: Says what is missing.
    """
    if importlib.util.find_spec("triton") is None:
        sys.exit("this benchmark needs the package triton: pip install 'siluette[gpu]'")
    import triton

    if name == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "this benchmark needs a CUDA device, and PyTorch finds none; "
            "TRITON_INTERPRET=1 with --device cpu checks results without times"
        )
    if name == "cpu" and not triton.knobs.runtime.interpret:
        sys.exit("--device cpu runs in Triton's interpreter: set TRITON_INTERPRET=1")
    return torch.device(name)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name in ("rows", "rounds"):
        given = getattr(options, name)
        if min(given if isinstance(given, list) else [given]) < 1:
            parser.error(f"--{name} must be at least 1")
    device = check_device(options.device)
    from bench.gpu import describe_device

    timed = device.type == "cuda"
    rounds = options.rounds if timed else 0
    cases = run(options.shape, options.rows, options.zeros, rounds, device, None if timed else 1)
    print_report(Console(width=TABLE_WIDTH), cases)
    settings = {
        "shapes": {str(shape): MODELS.get(shape) for shape in options.shape},
        "rows": options.rows,
        "correlations": CORRELATIONS,
        "zeros": options.zeros,
        "rounds": rounds,
    }
    results = {"cases": [case.to_json() for case in cases], "targets": targets(cases)}
    print(f"Written to {save('ffn-gpu', settings, results, options.out, describe_device(device))}")


if __name__ == "__main__":
    main()
