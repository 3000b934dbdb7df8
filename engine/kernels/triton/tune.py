"""Extends the table of this machine's GPU: tiles of a model's weights, and the costs that its router needs.

    python -m engine.kernels.triton.tune --feed-forward 4096x11008 --linear 12288x4096 4096x4096 32000x4096

Every candidate is timed as a CUDA graph on copies of the weight that are larger than a cache, with one row and with a
chunk of a prompt. Candidates are compiled in several processes before, which is most of the time. Another tile may give
other bits, so a table is part of what `same device` means.
"""

import argparse
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from engine.device import device_name
from engine.kernels.triton.activation import NEURONS, ActiveNeurons
from engine.kernels.triton.costs import measure_ffn_costs
from engine.kernels.triton.down import launch_down
from engine.kernels.triton.feed_forward import scratch_bytes
from engine.kernels.triton.linear import Workspace, is_whole, launch_product, launch_reduce
from engine.kernels.triton.timing import median_seconds
from engine.kernels.triton.tuning import (
    ROW_TILE,
    DeviceTable,
    Layout,
    Tile,
    costs_key,
    default_skipping_tile,
    default_tile,
    load_table,
    of_same_splits,
    save_table,
    tile_key,
)
from engine.kernels.triton.up import launch_gathered

CACHE_BYTES = 200_000_000  # of weights that are visited before one comes again: more than any cache holds
DECODE_ROWS, PROMPT_ROWS = 1, 512
ACTIVE = 0.1  # share of neurons that are active where the others are skipped
NARROW_ROWS = 16  # the least that a matrix instruction has
PROMPT_WEIGHT = 1 / 32  # a step with a chunk of a prompt comes once in so many steps
REPEATS = 7

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Layer:
    """What `measure_ffn_costs` goes round."""

    up: Tensor
    down: Tensor


def product_seconds(
    copies: Tensor,
    layout: Layout,
    tile: Tile,
    rows: int,
    device: torch.device,
    repeats: int = REPEATS,
    *,
    skipping: bool = False,
) -> float:
    """Seconds of one product as the engine launches it.

    Args:
        copies: [copies, out, in] or [copies, in, out], as `layout` says.
        layout: Of the weight.
        tile: To try.
        rows: Token rows.
        device: Of the weights.
        repeats: The median counts.
        skipping: Read weights of a few active neurons only, `ACTIVE` of all.
    """
    out, size = copies.shape[1:] if layout is Layout.OUT_IN else copies.shape[:0:-1]
    x = torch.randn(rows, size, device=device).to(copies.dtype)
    result = torch.zeros(rows, out, device=device)
    sums = torch.empty(tile.split_count(size), rows, out, device=device)
    whole = is_whole(tile, rows, size)
    target = result if whole else sums
    active = random_neurons(copies.shape[1], rows, device) if skipping else None

    def sweep() -> None:
        for weight in copies:
            _launch(x, weight, layout, tile, active, target, whole=whole)
            if not whole:
                launch_reduce(sums, result)

    return median_seconds(sweep, device, repeats) / len(copies)


def _launch(
    x: Tensor, weight: Tensor, layout: Layout, tile: Tile, active: ActiveNeurons | None, out: Tensor, *, whole: bool
) -> None:
    """The product as `tile` says: of all neurons, or of active ones."""
    if layout is Layout.IN_OUT:
        launch_down(x, weight, tile, None if active is None else active.flags, out, whole=whole)
    elif active is None:
        launch_product(x, weight, tile, out, whole=whole)
    else:
        launch_gathered(x, weight, tile, active, out.view(-1, len(x), len(weight)), whole=whole)


def random_neurons(intermediate: int, rows: int, device: torch.device) -> ActiveNeurons:
    """A list of `ACTIVE` of the neurons, the same for every row tile."""
    tiles, blocks = -(-rows // ROW_TILE), -(-intermediate // NEURONS)
    flags = torch.zeros(blocks * NEURONS, dtype=torch.uint8)
    flags[torch.randperm(intermediate, generator=torch.Generator().manual_seed(0))[: round(ACTIVE * intermediate)]] = 1
    by_block = flags.view(blocks, NEURONS)
    # Stable: active neurons first, in rising order.
    order = by_block.argsort(dim=1, descending=True, stable=True)
    neurons = order + NEURONS * torch.arange(blocks)[:, None]
    parts = (flags[:intermediate], neurons.reshape(-1).int(), by_block.sum(1).int())
    return ActiveNeurons(*(part.expand(tiles, -1).contiguous().to(device) for part in parts))


def compile_tile(
    tile: Tile, layout: Layout, out: int, inputs: int, dtype: torch.dtype, rows: Sequence[int], *, skipping: bool
) -> None:
    """Leave the kernels of a tile in Triton's cache on disk, for other processes. One that does not fit is none."""
    device = torch.device("cuda")
    shape = (1, out, inputs) if layout is Layout.OUT_IN else (1, inputs, out)
    weight = torch.empty(shape, dtype=dtype, device=device)
    for number in rows:
        try:
            product_seconds(weight, layout, tile, number, device, repeats=1, skipping=skipping)
        except (OutOfResources, PTXASError):
            return


def candidates(start: Tile) -> list[Tile]:
    """Tiles to try around the default one, all with its splits and stages."""
    return [
        replace(start, block_n=block_n, block_k=block_k, num_warps=num_warps)
        for block_n in (16, 32, 64, 128)
        for block_k in (32, 64, 128)
        for num_warps in (4, 8)
    ]


def with_stages(start: Tile) -> list[Tile]:
    """The same tile with other loads in flight."""
    return [replace(start, num_stages=num_stages) for num_stages in (2, 3, 4, 5, 6)]


def with_splits(start: Tile) -> list[Tile]:
    """The same tile with other splits."""
    return [replace(start, splits=splits) for splits in (1, 2, 3, 4, 6, 8, 12, 16, 32)]


def narrowed(start: Tile) -> list[Tile]:
    """The same tile with few rows, for steps that have no more."""
    return [
        replace(start, block_m=NARROW_ROWS, block_n=block_n, num_warps=num_warps, num_stages=num_stages)
        for block_n in (16, 32, 64, 128)
        for num_warps in (2, 4)
        for num_stages in (3, 5)
    ]


def same_bits(one: Tile, other: Tile, weight: Tensor, layout: Layout, device: torch.device) -> bool:
    """Whether two tiles add up a product [.., out, in] or [.., in, out] of a few rows in the same way."""
    out, size = weight.shape if layout is Layout.OUT_IN else weight.shape[::-1]
    x = torch.randn(NARROW_ROWS, size, device=device).to(weight.dtype)
    results = []
    for tile in (one, other):
        sums = torch.empty(tile.split_count(size), len(x), out, device=device)
        _launch(x, weight, layout, tile, None, sums, whole=False)
        results.append(sums)
    return results[0].shape == results[1].shape and torch.equal(*results)


def best_tile(
    layout: Layout,
    out: int,
    inputs: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    choices: Sequence[Callable[[Tile], list[Tile]]] = (candidates, with_stages, with_splits, narrowed),
    rows: Sequence[int] = (DECODE_ROWS, PROMPT_ROWS),
    cache_bytes: int = CACHE_BYTES,
    repeats: int = REPEATS,
    skipping: Tile | None = None,
    compilers: Executor | None = None,
    progress: Progress = print,
) -> Tile:
    """The fastest tile of a weight: the best of each list of choices in turn, each made around the best so far.

    Args:
        layout: Of the weight.
        out: Outputs.
        inputs: Inputs.
        dtype: Of the weight.
        device: Where to measure.
        choices: What to try.
        rows: Of a decoding step; and of a chunk of a prompt, which counts less.
        cache_bytes: Of weights that are visited before one comes again.
        repeats: Of each measurement; the median counts.
        skipping: Tune the tile that reads weights of active neurons only; this is the other one.
        compilers: Processes that compile candidates before they are timed; None to compile while timing.
        progress: Called with a line of text for each better tile.
    """
    shape = (out, inputs) if layout is Layout.OUT_IN else (inputs, out)
    count = max(1, -(-cache_bytes // (out * inputs * dtype.itemsize)))
    copies = torch.randn(shape, device=device).to(dtype).repeat(count, 1, 1)

    skips = skipping is not None
    times = partial(product_seconds, copies, layout, device=device, repeats=repeats, skipping=skips)

    def score(tile: Tile) -> float:
        try:
            seconds = [times(tile, number) for number in rows]
        except (OutOfResources, PTXASError):  # more shared memory or registers than the device has
            return float("inf")
        return seconds[0] + PROMPT_WEIGHT * sum(seconds[1:])

    best = default_tile(layout, out, inputs, dtype)
    if skipping is not None:
        best = of_same_splits(default_skipping_tile(layout, dtype), skipping)
    least = score(best)
    progress(f"{tile_key(layout, out, inputs, dtype, skipping=skips)}: default {1e6 * least:.1f} µs")
    for choose in choices:
        tried = choose(best)
        if compilers is not None:
            compiling = partial(
                compile_tile, layout=layout, out=out, inputs=inputs, dtype=dtype, rows=rows, skipping=skips
            )
            list(compilers.map(compiling, tried))
        for tile in tried:
            seconds = score(tile)
            if seconds < least and (
                tile.block_m == best.block_m or same_bits(tile, best, copies[0], layout, copies.device)
            ):
                best, least = tile, seconds
                progress(f"  {1e6 * least:.1f} µs: {best}")
    return best


def tune(
    linear: Sequence[tuple[int, int]],
    feed_forward: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    compilers: Executor | None = None,
    progress: Progress = print,
) -> DeviceTable:
    """Measure, and write what was found into the device's table.

    Args:
        linear: (out, in) of weights.
        feed_forward: (hidden, intermediate) of feed-forward layers.
        dtype: Of the weights.
        device: Where to measure.
        compilers: See `best_tile`.
        progress: Called with lines of text.

    Returns:
        The whole table.
    """
    name = device_name(device)
    table = load_table(name)
    best = partial(best_tile, dtype=dtype, device=device, compilers=compilers, progress=progress)
    weights = [(Layout.OUT_IN, out, inputs, False) for out, inputs in linear]
    for hidden, intermediate in feed_forward:
        weights += [(Layout.OUT_IN, intermediate, hidden, True), (Layout.IN_OUT, hidden, intermediate, True)]
    for layout, out, inputs, skips in weights:
        tile = best(layout, out, inputs)
        found = {tile_key(layout, out, inputs, dtype): tile}
        if skips:
            choices = (candidates, with_stages, narrowed)
            own = best(layout, out, inputs, choices=choices, rows=(DECODE_ROWS,), skipping=tile)
            found[tile_key(layout, out, inputs, dtype, skipping=True)] = own
        table = replace(table, tiles={**table.tiles, **found})
        save_table(name, table)
    for hidden, intermediate in feed_forward:
        key = costs_key(hidden, intermediate, dtype)
        table = replace(table, costs={**table.costs, key: _costs(hidden, intermediate, dtype, device)})
        path = save_table(name, table)
        progress(f"{key}: costs of both paths are in {path}")
    return table


def _costs(hidden: int, intermediate: int, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[float, ...]]:
    count = max(1, -(-CACHE_BYTES // (2 * hidden * intermediate * dtype.itemsize)))
    layers = [
        Layer(*(torch.randn(intermediate, hidden, device=device).to(dtype) for _ in range(2))) for _ in range(count)
    ]
    costs = measure_ffn_costs(layers, Workspace(scratch_bytes(layers[0].up), device))
    return {"dense": costs.dense, "sparse_low": costs.sparse_low, "sparse_high": costs.sparse_high}


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"must be two numbers with an x between them, such as 4096x11008, got {text!r}"
        )
    return int(match[1]), int(match[2])


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m engine.kernels.triton.tune", description=__doc__)
    parser.add_argument("--linear", type=_shape, nargs="+", default=[], metavar="OUTxIN", help="weights of products")
    parser.add_argument(
        "--feed-forward",
        type=_shape,
        nargs="+",
        default=[],
        metavar="HIDDENxINTERMEDIATE",
        help="feed-forward layers: gate, up, down, and the costs of skipping zeros",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile (default: one for each core)"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not options.linear and not options.feed_forward:
        parser.error("nothing to tune: name weights with --linear or --feed-forward")
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    if not torch.cuda.is_available():
        sys.exit("tuning needs a CUDA device, and PyTorch finds none")
    # A process that has used CUDA cannot fork.
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as compilers:
        tune(options.linear, options.feed_forward, getattr(torch, options.dtype), torch.device("cuda"), compilers)


if __name__ == "__main__":
    main()
