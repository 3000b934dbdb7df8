"""The picture of `bench.pretraining`: loss curves, their difference from the first recipe's, and final losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from evaluation.plots import COLOURS, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIRST_SHOWN = 0.1  # share of the run that is not considered for the range of losses: it falls from far above


@dataclass(frozen=True, slots=True)
class Series:
    """One recipe.

    Attributes:
        label: For the legend.
        tokens: [points], read so far.
        losses: [seeds][points], of training.
        final: [seeds], on held-out text, with the recipe's final activation.
    """

    label: str
    tokens: Sequence[int]
    losses: Sequence[Sequence[float]]
    final: Sequence[float]


def plot(series: Sequence[Series], switch: int, path: Path) -> None:
    """Draw all recipes: means of the seeds, with bands from the least to the greatest.

    Args:
        series: The recipes, all with the same seeds and points; the others are compared with the first.
        switch: Tokens read before the switch to RELU.
        path: SVG file to write; its folder is made if it does not exist.
    """
    from matplotlib.figure import Figure

    base = np.asarray(series[0].losses)
    figure = Figure(figsize=(13, 4), layout="constrained")
    whole, difference, final = figure.subplots(1, 3, width_ratios=(4, 4, 2.6))
    _draw_curves(whole, series, [np.asarray(item.losses) for item in series], switch)
    whole.set(title="training loss", ylabel="nats per token")
    whole.legend(frameon=False)
    # Seeds have batches of their own, recipes of one seed the same: differences are free of the batches' noise.
    _draw_curves(difference, series, [np.asarray(item.losses) - base for item in series], switch)
    difference.set(title=f"training loss minus that of {series[0].label}", ylabel="nats per token")
    _draw_final(final, series)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def _draw_curves(axes: "Axes", series: Sequence[Series], values: Sequence[NDArray[np.float64]], switch: int) -> None:
    """Curves and bands of values [seeds, points]; their range is that of what comes after `FIRST_SHOWN`."""
    million = np.asarray(series[0].tokens) / 1e6
    for number, (item, seeds) in enumerate(zip(series, values, strict=True)):
        axes.plot(million, seeds.mean(0), color=COLOURS[number], linewidth=1.4, label=item.label)
        axes.fill_between(million, seeds.min(0), seeds.max(0), color=COLOURS[number], alpha=0.15, linewidth=0)
    if switch / 1e6 < million[-1]:
        axes.axvline(switch / 1e6, color="#777777", linewidth=0.8, linestyle="--")
    shown = np.concatenate([seeds[:, million >= FIRST_SHOWN * million[-1]] for seeds in values])
    margin = 0.05 * (shown.max() - shown.min()) + 1e-6
    axes.set(
        xlabel="million tokens", xlim=(0, million[-1]), ylim=(float(shown.min() - margin), float(shown.max() + margin))
    )
    axes.spines[["top", "right"]].set_visible(False)


def _draw_final(axes: "Axes", series: Sequence[Series]) -> None:
    """A dot for each seed and a line at their mean."""
    for place, item in enumerate(series):
        axes.plot([place] * len(item.final), item.final, "o", color=COLOURS[place], markersize=5, alpha=0.7)
        axes.hlines(np.mean(item.final), place - 0.25, place + 0.25, color=COLOURS[place], linewidth=1.6)
    axes.set(title="held-out loss at the end", ylabel="nats per token", xlim=(-0.6, len(series) - 0.4))
    axes.set_xticks(range(len(series)), [item.label for item in series])
    axes.spines[["top", "right"]].set_visible(False)
