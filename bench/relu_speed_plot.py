"""The picture of `bench.relu_speed`: idle neurons by layer, and below them how much faster the blocks are."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.relu_feed_forward import RowsResult
from evaluation.plots import COLOURS, save_figure

GROUP_WIDTH = 0.8  # of the bars of one layer together; layers are 1 apart


def plot(results: Sequence[RowsResult], path: Path) -> None:
    """Draw all layers: bars for each number of rows, lines for the zeros of a row and for the bound of speed.

    Args:
        results: One entry for each number of rows, of the same model.
        path: SVG or PNG file to write; its folder is made if it does not exist.
    """
    from matplotlib.figure import Figure

    layers = range(len(results[0].layers))
    figure = Figure(figsize=(max(9.0, 0.3 * len(layers) + 1.5), 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    width = GROUP_WIDTH / len(results)
    for number, result in enumerate(results):
        colour, total = COLOURS[number % len(COLOURS)], result.total
        rows = f"{result.rows} row{'s' if result.rows > 1 else ''} at once"
        left = [layer + number * width - GROUP_WIDTH / 2 for layer in layers]
        right = [place + width for place in left]

        idle = [100 * block.idle for block in result.layers]
        above.bar(left, idle, width, align="edge", color=colour, label=f"idle, {rows} (mean {total.idle:.1%})")
        zeros = [100 * block.zeros for block in result.layers]
        above.hlines(zeros, left, right, "black", label=None if number else f"zeros (mean {total.zeros:.1%})")

        speedup = [statistics.median(block.speedup) for block in result.layers]
        label = f"{rows} (all layers {statistics.median(total.speedup):.2f}x)"
        below.bar(left, speedup, width, align="edge", color=colour, label=label)
        bounds = [block.bound for block in result.layers]
        below.hlines(bounds, left, right, "black", label=None if number else "bound: bytes of weights read")
    above.set(ylabel="neurons, %", ylim=(0, 100))
    below.set(xlabel="layer", ylabel="speed of RELU / speed of SILU")
    below.axhline(1, color="#777777", linewidth=0.8, linestyle="--")
    below.set_xlim(-0.6, len(layers) - 0.4)
    below.set_xticks(range(0, len(layers), 1 if len(layers) <= 16 else 2))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
