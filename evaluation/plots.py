"""Pictures of an evaluation, as SVG or PNG by the suffix of their path. Needs matplotlib, of the extra `eval`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.best_of_n import ControlResult
from evaluation.diversity import Diversity
from evaluation.errors import PlotError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png")
# Okabe and Ito's palette: told apart with any kind of colour blindness. Markers differ as well, for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", "-.", ":")
LOG_SCALE_FROM = 10.0  # ratio of the largest to the smallest value

# Name of a measure -> (what its axis says, value; more is more diverse).
DIVERSITY_MEASURES: dict[str, tuple[str, Callable[[Diversity], float | None]]] = {
    "unique": ("different answers / all answers", lambda diversity: diversity.unique),
    "distinct_1": ("distinct-1", lambda diversity: diversity.distinct_1),
    "distinct_2": ("distinct-2", lambda diversity: diversity.distinct_2),
    "distinct_3": ("distinct-3", lambda diversity: diversity.distinct_3),
    "self_bleu": (
        "1 - self-BLEU",
        lambda diversity: None if diversity.self_bleu is None else 1 - diversity.self_bleu,
    ),
}


def plot_quality_diversity(
    results: Sequence[ControlResult], path: Path, measure: str = "self_bleu", best_of: Sequence[int] | None = None
) -> None:
    """Accuracy against diversity, one curve for each family of controls, points labelled with temperature or p.

    Args:
        results: Results of one evaluation.
        path: File to write, .svg or .png.
        measure: Key of `DIVERSITY_MEASURES`.
        best_of: One panel for each N: accuracy of the best of N; None draws N = 1 and the largest.

    Raises:
        PlotError: Nothing to draw, `measure`, an N or the suffix of `path` is unknown, or the file cannot be written.
    """
    if measure not in DIVERSITY_MEASURES:
        raise PlotError(f"measure must be one of {', '.join(DIVERSITY_MEASURES)}, got {measure!r}")
    families = _by_family(results)
    measured = {entry.n for entry in results[0].best_of}
    panels = sorted({1, max(measured)}) if best_of is None else list(best_of)
    if not panels:
        raise PlotError("best_of must name at least one N")
    for result in results:
        if missing := set(panels) - {entry.n for entry in result.best_of}:
            raise PlotError(f"'{result.control.label}' has no best of {min(missing)}")
    axis_name, value_of = DIVERSITY_MEASURES[measure]
    figure = _new_figure(5.5 * len(panels) + 0.5, 5.5)
    for place, n in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        for number, (family, members) in enumerate(families.items()):
            drawn = [(value, result) for result in members if (value := value_of(result.diversity)) is not None]
            _draw_family(axes, number, family, drawn, n)
        _name_axes(axes, axis_name, f"accuracy of {'one sample' if n == 1 else f'the best of {n} samples'}")
    _legend_below(figure, columns=3)
    save_figure(figure, path)


def plot_best_of_n(results: Sequence[ControlResult], path: Path) -> None:
    """Accuracy of the best of N samples against N, one curve for each control, one colour for each family.

    Args:
        results: Results of one evaluation; some ten curves are legible.
        path: File to write, .svg or .png.

    Raises:
        PlotError: Nothing to draw, an unknown suffix, or the file cannot be written.
    """
    families = _by_family(results)
    figure = _new_figure(9.0, 5.5)
    axes = figure.add_subplot()
    for number, members in enumerate(families.values()):
        for place, result in enumerate(members):
            axes.errorbar(
                [entry.n for entry in result.best_of],
                [entry.accuracy for entry in result.best_of],
                yerr=[entry.stderr or 0.0 for entry in result.best_of],
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                linestyle=LINE_STYLES[place % len(LINE_STYLES)],
                markersize=4,
                elinewidth=0.6,
                label=result.control.label,
            )
    ticks = sorted({entry.n for result in results for entry in result.best_of})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(n) for n in ticks])
    _name_axes(axes, "N", "accuracy of the best of N samples")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_perplexity(curves: Mapping[str, Mapping[float, float]], path: Path) -> None:
    """Perplexity against p, from SILU (p = 1) on the left to RELU (p = 0) on the right.

    Args:
        curves: Name of a curve (a text, a checkpoint) -> {p: perplexity}.
        path: File to write, .svg or .png.

    Raises:
        PlotError: Nothing to draw, an unknown suffix, or the file cannot be written.
    """
    values = [value for curve in curves.values() for value in curve.values()]
    if not values:
        raise PlotError("there is no perplexity to draw")
    figure = _new_figure(7.0, 5.0)
    axes = figure.add_subplot()
    for number, (name, curve) in enumerate(curves.items()):
        points = sorted(curve.items(), reverse=True)
        axes.plot([p for p, _ in points], [value for _, value in points], label=name, **_style(number))
    if max(values) >= LOG_SCALE_FROM * min(values):
        axes.set_yscale("log")
    axes.invert_xaxis()
    _name_axes(axes, "p, probability of SILU for a negative gate value", "perplexity")
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_zeros(zeros: Mapping[str, Sequence[float]], path: Path) -> None:
    """Zeros of act(gate) by layer, as bars side by side.

    Args:
        zeros: Name (a mode, a checkpoint) -> share of zeros of each layer, in [0, 1]; all of the same length.
        path: File to write, .svg or .png.

    Raises:
        PlotError: Nothing to draw, lengths that differ, an unknown suffix, or the file cannot be written.
    """
    lengths = {len(shares) for shares in zeros.values()}
    if not lengths or lengths == {0}:
        raise PlotError("there are no zeros to draw")
    if len(lengths) > 1:
        raise PlotError(f"the series have different numbers of layers: {', '.join(map(str, sorted(lengths)))}")
    (layers,) = lengths
    width = 0.8 / len(zeros)
    figure = _new_figure(max(6.0, 0.3 * layers + 1.5), 4.5)
    axes = figure.add_subplot()
    for number, (name, shares) in enumerate(zeros.items()):
        places = [layer + (number + 0.5) * width - 0.4 for layer in range(layers)]
        axes.bar(
            places,
            [100 * share for share in shares],
            width,
            color=COLOURS[number % len(COLOURS)],
            label=f"{name} (mean {sum(shares) / layers:.1%})",
        )
    axes.set_ylim(0, 100)
    axes.set_xticks(range(0, layers, 1 if layers <= 16 else 2))
    _name_axes(axes, "layer", "zeros of act(gate), %")
    axes.grid(visible=False, axis="x")
    _legend_below(figure, columns=len(zeros))
    save_figure(figure, path)


def _by_family(results: Sequence[ControlResult]) -> dict[str, list[ControlResult]]:
    """Results of each family, in order of the value that it varies."""
    if not results:
        raise PlotError("there are no results to draw")
    families: dict[str, list[ControlResult]] = {}
    for result in results:
        families.setdefault(result.control.family, []).append(result)
    return {name: sorted(members, key=lambda result: result.control.value or 0.0) for name, members in families.items()}


def _draw_family(axes: "Axes", number: int, family: str, points: Sequence[tuple[float, ControlResult]], n: int) -> None:
    """One curve of (diversity, result) with error bars and the control's value at each point."""
    scores = [next(entry for entry in result.best_of if entry.n == n) for _, result in points]
    places = [diversity for diversity, _ in points]
    accuracies = [score.accuracy for score in scores]
    axes.errorbar(
        places,
        accuracies,
        yerr=[score.stderr or 0.0 for score in scores],
        elinewidth=0.6,
        label=family,
        **_style(number),
    )
    for place, accuracy, (_, result) in zip(places, accuracies, points, strict=True):
        if result.control.value is not None:
            axes.annotate(
                f"{result.control.value:g}",
                (place, accuracy),
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8,
                color=COLOURS[number % len(COLOURS)],
            )


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINE_STYLES[number // len(COLOURS) % len(LINE_STYLES)],
        "markersize": 5,
        "linewidth": 1.5,
    }


def _name_axes(axes: "Axes", x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend_below(figure: "Figure", columns: int) -> None:
    """One legend for all panels, which have the same curves."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _new_figure(width: float, height: float) -> "Figure":
    """A figure of its own: no pyplot, so nothing stays behind in the process."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("plots need matplotlib: install Siluette's extra 'eval'") from error

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a picture; the same numbers give the same file.

    Args:
        figure: The picture.
        path: File to write, .svg or .png.

    Raises:
        PlotError: An unknown suffix, or the file cannot be written.
    """
    import matplotlib

    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise PlotError(f"a plot's file must end in {' or '.join(FORMATS)}, got {path.name!r}")
    # SVG with text as text, and without date and random ids.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "siluette"}):
        try:
            figure.savefig(path, format=suffix[1:], dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
        except OSError as error:
            raise PlotError(f"cannot write {path}: {error}") from error
