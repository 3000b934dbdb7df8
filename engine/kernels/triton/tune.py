"""Extends the table of this machine's GPU: tiles of a model's weights, and the costs that its router needs.

    python -m engine.kernels.triton.tune --feed-forward 4096x11008 --linear 12288x4096 4096x4096 32000x4096

Every candidate is timed as a CUDA graph on copies of the weight that are larger than a cache, with one row and with a
chunk of a prompt. Another tile may give other bits, so a table is part of what `same device` means.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from engine.kernels.triton.costs import measure_ffn_costs
from engine.kernels.triton.down import launch_down
from engine.kernels.triton.feed_forward import scratch_bytes
from engine.kernels.triton.linear import Workspace, is_whole, launch_product, launch_reduce
from engine.kernels.triton.timing import median_seconds
from engine.kernels.triton.tuning import (
    DeviceTable,
    Layout,
    Tile,
    costs_key,
    default_tile,
    device_name,
    load_table,
    save_table,
    tile_key,
)

CACHE_BYTES = 200_000_000  # of weights that are visited before one comes again: more than any cache holds
DECODE_ROWS, PROMPT_ROWS = 1, 512
PROMPT_WEIGHT = 1 / 32  # a step with a chunk of a prompt comes once in so many steps
REPEATS = 7

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Layer:
    """What `measure_ffn_costs` goes round."""

    up: Tensor
    down: Tensor


def product_seconds(
    copies: Tensor, layout: Layout, tile: Tile, rows: int, device: torch.device, repeats: int = REPEATS
) -> float:
    """Seconds of one product as the engine launches it.

    Args:
        copies: [copies, out, in] or [copies, in, out], as `layout` says.
        layout: Of the weight.
        tile: To try.
        rows: Token rows.
        device: Of the weights.
        repeats: The median counts.
    """
    out, size = copies.shape[1:] if layout is Layout.OUT_IN else copies.shape[:0:-1]
    x = torch.randn(rows, size, device=device).to(copies.dtype)
    result = torch.zeros(rows, out, device=device)
    sums = torch.empty(tile.split_count(size), rows, out, device=device)
    whole = is_whole(tile, rows, size)
    target = result if whole else sums

    def sweep() -> None:
        for weight in copies:
            if layout is Layout.OUT_IN:
                launch_product(x, weight, tile, target, whole=whole)
            else:
                launch_down(x, weight, tile, None, target, whole=whole)
            if not whole:
                launch_reduce(sums, result)

    return median_seconds(sweep, device, repeats) / len(copies)


def candidates(start: Tile) -> list[Tile]:
    """Tiles to try around the default one, all with its splits."""
    return [
        replace(start, block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=num_stages)
        for block_n in (32, 64, 128)
        for block_k in (32, 64, 128)
        for num_warps in (4, 8)
        for num_stages in (2, 3, 4, 5)
    ]


def with_splits(start: Tile) -> list[Tile]:
    """The same tile with other splits."""
    return [replace(start, splits=splits) for splits in (1, 2, 4, 8, 16, 32)]


def best_tile(
    layout: Layout,
    out: int,
    inputs: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    choices: Sequence[Callable[[Tile], list[Tile]]] = (candidates, with_splits),
    rows: tuple[int, int] = (DECODE_ROWS, PROMPT_ROWS),
    cache_bytes: int = CACHE_BYTES,
    repeats: int = REPEATS,
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
        rows: Of a decoding step and of a chunk of a prompt.
        cache_bytes: Of weights that are visited before one comes again.
        repeats: Of each measurement; the median counts.
        progress: Called with a line of text for each better tile.
    """
    shape = (out, inputs) if layout is Layout.OUT_IN else (inputs, out)
    count = max(1, -(-cache_bytes // (out * inputs * dtype.itemsize)))
    copies = torch.randn(shape, device=device).to(dtype).repeat(count, 1, 1)

    def score(tile: Tile) -> float:
        try:
            decode, prompt = (product_seconds(copies, layout, tile, number, device, repeats) for number in rows)
        except (OutOfResources, PTXASError):  # more shared memory or registers than the device has
            return float("inf")
        return decode + PROMPT_WEIGHT * prompt

    best = default_tile(layout, out, inputs, dtype)
    least = score(best)
    progress(f"{tile_key(layout, out, inputs, dtype)}: default {1e6 * least:.1f} µs")
    for choose in choices:
        for tile in choose(best):
            seconds = score(tile)
            if seconds < least:
                best, least = tile, seconds
                progress(f"  {1e6 * least:.1f} µs: {best}")
    return best


def tune(
    linear: Sequence[tuple[int, int]],
    feed_forward: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = print,
) -> DeviceTable:
    """Measure, and write what was found into the device's table.

    Args:
        linear: (out, in) of weights.
        feed_forward: (hidden, intermediate) of feed-forward layers.
        dtype: Of the weights.
        device: Where to measure.
        progress: Called with lines of text.

    Returns:
        The whole table.
    """
    name = device_name(device)
    table = load_table(name)
    weights = [(Layout.OUT_IN, out, inputs) for out, inputs in linear]
    for hidden, intermediate in feed_forward:
        weights += [(Layout.OUT_IN, intermediate, hidden), (Layout.IN_OUT, hidden, intermediate)]
    for layout, out, inputs in weights:
        tile = best_tile(layout, out, inputs, dtype, device, progress=progress)
        table = replace(table, tiles={**table.tiles, tile_key(layout, out, inputs, dtype): tile})
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
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not options.linear and not options.feed_forward:
        parser.error("nothing to tune: name weights with --linear or --feed-forward")
    if not torch.cuda.is_available():
        sys.exit("tuning needs a CUDA device, and PyTorch finds none")
    tune(options.linear, options.feed_forward, getattr(torch, options.dtype), torch.device("cuda"))


if __name__ == "__main__":
    main()
