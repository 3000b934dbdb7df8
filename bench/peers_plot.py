"""The picture of `bench.peers`: output tokens per second of every peer, one panel for each number of streams."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.plots import COLOURS, save_figure

OURS = "siluette"
PANEL_WIDTH = 3.6
ROW_HEIGHT = 0.34


def plot(peers: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw bars of the medians, with lines from the slowest to the fastest round.

    Args:
        peers: Name -> what `bench.peers_results.Record.to_json` gives. Those without a figure at some number of streams
            have no bar there.
        path: SVG or PNG file to write; its folder is made if it does not exist.
    """
    from matplotlib.figure import Figure

    drawn = {name: peer for name, peer in peers.items() if peer.get("streams")}
    streams = sorted({int(number) for peer in drawn.values() for number in peer["streams"]})
    size = (PANEL_WIDTH * len(streams) + 2.5, ROW_HEIGHT * len(drawn) + 1.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(streams), sharey=True, squeeze=False)[0]
    for axes, number in zip(panels, streams, strict=True):
        for place, (name, peer) in enumerate(drawn.items()):
            load = peer["streams"].get(str(number))
            if load is None:
                continue
            rate = load["tokens_per_second"]
            middle = rate["median"]
            colour = COLOURS[0] if name.startswith(OURS) else COLOURS[1]
            error = [[middle - rate["min"]], [rate["max"] - middle]]
            axes.barh(place, middle, 0.7, color=colour, xerr=error, ecolor="#777777")
            axes.annotate(f"{middle:.0f}", (rate["max"], place), xytext=(4, 0), textcoords="offset points", va="center")
        axes.set(title=f"{number} stream{'s' if number > 1 else ''}", xlabel="output tokens/s")
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(drawn)), [peer["title"] for peer in drawn.values()])
    panels[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
