"""The picture of `bench.decode`: tokens per second of modes and quantisations, one panel for each number of streams."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.plots import COLOURS, save_figure

GROUP_WIDTH = 0.8  # of the bars of one quantisation together; quantisations are 1 apart


def plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw bars of the medians, with lines from the slowest to the fastest round.

    Args:
        results: What `bench.decode.summarise` gives.
        path: SVG or PNG file to write; its folder is made if it does not exist.
    """
    from matplotlib.figure import Figure

    streams = list(dict.fromkeys(case["streams"] for case in results[0]["cases"]))
    modes = list(dict.fromkeys(case["mode"] for case in results[0]["cases"]))
    width = GROUP_WIDTH / len(modes)
    figure = Figure(figsize=(4 * len(streams) + 1, 4), layout="constrained")
    panels = figure.subplots(1, len(streams), squeeze=False)[0]
    for axes, count in zip(panels, streams, strict=True):
        for number, mode in enumerate(modes):
            rates = [_rate(result, count, mode) for result in results]
            middle = [rate["median"] for rate in rates]
            reach = [[rate["median"] - rate["min"] for rate in rates], [rate["max"] - rate["median"] for rate in rates]]
            left = [place + number * width - GROUP_WIDTH / 2 for place in range(len(results))]
            colour = COLOURS[number % len(COLOURS)]
            axes.bar(left, middle, width, align="edge", color=colour, yerr=reach, ecolor="#777777", label=mode)
        axes.set_title(f"{count} stream{'s' if count > 1 else ''}")
        axes.set_xticks(range(len(results)), [_name(result["quantize"]) for result in results])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("tokens/s while all streams decode")
    panels[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def _rate(result: Mapping[str, Any], streams: int, mode: str) -> Mapping[str, float]:
    wanted = (case for case in result["cases"] if case["streams"] == streams and case["mode"] == mode)
    rate: Mapping[str, float] = next(wanted)["tokens_per_second"]
    return rate


def _name(quantize: str) -> str:
    return "not quantised" if quantize == "none" else quantize
