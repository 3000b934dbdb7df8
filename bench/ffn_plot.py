"""The picture of `bench.ffn`: speed over zeros, one line for each number of rows, one panel for each format."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.plots import COLOURS, MARKERS, save_figure


def plot(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw how many times as fast as PyTorch's dense block the sparse path and the router's choice are.

    Args:
        cases: What `bench.ffn.Case.to_json` gives, all of one shape.
        path: SVG or PNG file to write; its folder is made if it does not exist.
    """
    from matplotlib.figure import Figure

    formats = list(dict.fromkeys(case["format"] for case in cases))
    figure = Figure(figsize=(6 * len(formats), 5), layout="constrained")
    panels = figure.subplots(1, len(formats), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, formats, strict=True):
        for number, case in enumerate(case for case in cases if case["format"] == name):
            cells = sorted(case["sparse"], key=lambda cell: float(cell["wanted"]))
            zeros = [100 * cell["wanted"] for cell in cells]
            colour = COLOURS[number % len(COLOURS)]
            label = f"{case['rows']} row{'s' if case['rows'] > 1 else ''}"
            routed = [cell["routed_over_torch"]["median"] for cell in cells]
            axes.plot(zeros, routed, color=colour, marker=MARKERS[number % len(MARKERS)], markersize=4, label=label)
            sparse = [cell["sparse_over_torch"]["median"] for cell in cells]
            axes.plot(zeros, sparse, color=colour, linestyle=":", linewidth=1)
        axes.axhline(1, color="#777777", linewidth=0.8, linestyle="--")
        axes.set(title=f"{cases[0]['shape']}, {name}", xlabel="zeros of act(gate), %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, title="at once; dotted: without router", title_fontsize=8)
    panels[0].set_ylim(bottom=0)  # of all, and only now that the highest line is known
    panels[0].set_ylabel("speed / speed of PyTorch's dense bfloat16 block")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
