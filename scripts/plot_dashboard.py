"""Draw the dashboard without Grafana: `python -m scripts.plot_dashboard --prometheus URL --minutes 5`.

Panels and queries come from the dashboard's JSON, their data from a Prometheus, the drawing from matplotlib.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

ROOT = Path(__file__).parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "siluette.json"
OUT = ROOT / "docs" / "images" / "dashboard.png"
CELL = 0.62, 0.32  # inches of one cell of Grafana's grid, 24 of which are its width
GAP = 0.45  # inches between panels
STEPS = 150  # points of a line
UNITS = {"s": "seconds", "short": "", "reqps": "per second", "bytes": "bytes", "percentunit": ""}


def series_of(prometheus: str, expression: str, begin: float, end: float) -> list[dict[str, Any]]:
    """The series of a query over a range of time (Unix seconds)."""
    parameters: dict[str, str | float] = {
        "query": expression,
        "start": begin,
        "end": end,
        "step": max(1.0, (end - begin) / STEPS),
    }
    response = httpx.get(f"{prometheus}/api/v1/query_range", params=parameters, timeout=60)
    response.raise_for_status()
    series: list[dict[str, Any]] = response.json()["data"]["result"]
    return series


def legend_of(template: str, labels: dict[str, str]) -> str:
    """`{{label}}` in a template as the label's value."""
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), template)


def draw(axes: Axes, panel: dict[str, Any], lines: dict[str, list[tuple[float, float]]]) -> None:
    """One panel: a line for each series, or areas on one another."""
    defaults = panel["fieldConfig"]["defaults"]
    stacked = defaults["custom"].get("stacking", {}).get("mode") == "normal"
    axes.set_title(panel["title"], fontsize=9, loc="left", fontweight="bold")
    times = sorted({moment for points in lines.values() for moment, _ in points})
    minutes = [(moment - times[-1]) / 60 for moment in times]
    if stacked and times:
        rows = [[dict(points).get(moment, 0.0) for moment in times] for points in lines.values()]
        axes.stackplot(minutes, rows, labels=list(lines), alpha=0.6)
    else:
        for name, points in lines.items():
            found = dict(points)
            axes.plot(minutes, [found.get(moment, float("nan")) for moment in times], label=name, linewidth=1.2)
    axes.set_ylim(0, defaults.get("max"))
    if defaults["unit"] == "percentunit":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif defaults["unit"] == "bytes":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g} MB"))
    else:
        axes.set_ylabel(UNITS.get(defaults["unit"], defaults["unit"]), fontsize=7)
    axes.set_xlabel("minutes", fontsize=7, labelpad=1)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize=6, loc="upper left", ncols=2, framealpha=0.7)
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", fontsize=8)


def plot(prometheus: str, minutes: float, window: str, path: Path) -> None:
    """Draw all panels where Grafana would put them.

    Args:
        prometheus: Its address.
        minutes: So much of the past.
        window: What rates are taken over, `$__rate_interval` in Grafana.
        path: The picture, PNG or SVG by its suffix.
    """
    mpl.use("agg")
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) + 1  # room for the last axis
    width_inches, height_inches = 24 * CELL[0], height * CELL[1]
    figure = Figure(figsize=(width_inches, height_inches))
    end = time.time()
    for panel in panels:
        lines: dict[str, list[tuple[float, float]]] = {}
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", window)
            expression = expression.replace("$job", "siluette").replace("$instance", ".*")
            for series in series_of(prometheus, expression, end - 60 * minutes, end):
                name = legend_of(target["legendFormat"], series["metric"])
                lines[name] = [(moment, float(value)) for moment, value in series["values"]]
        place = panel["gridPos"]
        box = (
            (place["x"] * CELL[0] + GAP) / width_inches,
            1 - ((place["y"] + place["h"]) * CELL[1] - GAP / 2) / height_inches,
            (place["w"] * CELL[0] - 1.3 * GAP) / width_inches,
            (place["h"] * CELL[1] - 1.4 * GAP) / height_inches,
        )
        draw(figure.add_axes(box), panel, lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.plot_dashboard", description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--minutes", type=float, default=15.0, help="so much of the past")
    parser.add_argument("--window", default="1m", help="what rates are taken over")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    options = parser.parse_args()
    plot(options.prometheus, options.minutes, options.window, options.out)
    print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
