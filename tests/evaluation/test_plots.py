"""Pictures: what they say, and that the same numbers give the same file."""

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from engine import Activation, ActivationMode, SamplingParams, Scope
from evaluation.best_of_n import ControlResult, score_control
from evaluation.controls import Control, stochastic_control, temperature_control
from evaluation.errors import PlotError
from evaluation.plots import DIVERSITY_MEASURES, plot_best_of_n, plot_perplexity, plot_quality_diversity, plot_zeros
from evaluation.questions import Question

QUESTIONS = [Question("Capital of France?", ("Paris",)), Question("Capital of Italy?", ("Rome",))]


def result(control: Control, wrong: int) -> ControlResult:
    """Four answers to each question, of which `wrong` are wrong, each in its own way."""
    answers = [[f"Oslo {place} x" for place in range(wrong)] + [right] * (4 - wrong) for right in ("Paris", "Rome")]
    return score_control(control, QUESTIONS, answers, ["Paris", "Rome"], encode=lambda text: list(text.encode()))


RESULTS = [
    result(temperature_control(1.5), 3),
    result(temperature_control(0.3), 1),
    result(stochastic_control(0.9), 1),
    result(stochastic_control(0.5), 2),
    result(stochastic_control(0.55, 0.7, Scope.DECODE), 2),
    result(Control("RELU greedy", "RELU", None, SamplingParams(temperature=0.0), Activation(ActivationMode.RELU)), 0),
]

PLOTS: dict[str, Callable[[Path], None]] = {
    "quality": lambda path: plot_quality_diversity(RESULTS, path),
    "best of n": lambda path: plot_best_of_n(RESULTS, path),
    "perplexity": lambda path: plot_perplexity({"technical": {1.0: 12.0, 0.5: 33.6, 0.0: 3212.0}}, path),
    "zeros": lambda path: plot_zeros({"relu": [0.4, 0.9, 0.8], "tuned": [0.5, 0.95, 0.85]}, path),
}


def texts(path: Path) -> list[str]:
    tree = ElementTree.parse(path)
    return ["".join(element.itertext()).strip() for element in tree.iter() if element.tag.endswith("}text")]


@pytest.mark.parametrize("plot", PLOTS.values(), ids=list(PLOTS))
class TestFiles:
    def test_suffix_chooses_the_format(self, plot: Callable[[Path], None], tmp_path: Path) -> None:
        plot(tmp_path / "plot.PNG")
        plot(tmp_path / "plot.svg")
        assert (tmp_path / "plot.PNG").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("}svg")

    def test_same_numbers_give_the_same_file(self, plot: Callable[[Path], None], tmp_path: Path) -> None:
        plot(tmp_path / "first.svg")
        plot(tmp_path / "second.svg")
        assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()

    def test_other_suffix_is_refused(self, plot: Callable[[Path], None], tmp_path: Path) -> None:
        with pytest.raises(PlotError, match=r"\.svg or \.png"):
            plot(tmp_path / "plot.pdf")

    def test_missing_folder_is_named(self, plot: Callable[[Path], None], tmp_path: Path) -> None:
        with pytest.raises(PlotError, match="missing"):
            plot(tmp_path / "missing" / "plot.svg")


class TestQualityAgainstDiversity:
    @pytest.mark.parametrize("measure", DIVERSITY_MEASURES)
    def test_names_families_values_and_axes(self, measure: str, tmp_path: Path) -> None:
        plot_quality_diversity(RESULTS, tmp_path / "plot.svg", measure)
        written = texts(tmp_path / "plot.svg")
        assert {"temperature", "p, greedy", "p, temperature 0.7, decode only", "RELU"} <= set(written)
        assert written.count("0.55") == 2  # a point's label, in both panels
        assert DIVERSITY_MEASURES[measure][0] in written
        assert {"accuracy of one sample", "accuracy of the best of 4 samples"} <= set(written)

    def test_draws_the_panels_that_are_asked_for(self, tmp_path: Path) -> None:
        plot_quality_diversity(RESULTS, tmp_path / "plot.svg", best_of=[2])
        panels = [text for text in texts(tmp_path / "plot.svg") if text.startswith("accuracy")]
        assert panels == ["accuracy of the best of 2 samples"]

    def test_single_sample_has_no_self_bleu_to_draw(self, tmp_path: Path) -> None:
        single = score_control(
            temperature_control(1.0), QUESTIONS, [["Paris"], ["Oslo"]], ["Paris", "Rome"], lambda text: [len(text)]
        )
        plot_quality_diversity([single], tmp_path / "plot.svg")
        assert "1 - self-BLEU" in texts(tmp_path / "plot.svg")

    def test_unknown_measure_and_n_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(PlotError, match="measure must be one of unique, distinct_1"):
            plot_quality_diversity(RESULTS, tmp_path / "plot.svg", "entropy")
        with pytest.raises(PlotError, match="has no best of 8"):
            plot_quality_diversity(RESULTS, tmp_path / "plot.svg", best_of=[1, 8])
        with pytest.raises(PlotError, match="at least one N"):
            plot_quality_diversity(RESULTS, tmp_path / "plot.svg", best_of=[])


def test_best_of_n_names_every_control_and_n(tmp_path: Path) -> None:
    plot_best_of_n(RESULTS, tmp_path / "plot.svg")
    assert {entry.control.label for entry in RESULTS} | {"1", "2", "4"} <= set(texts(tmp_path / "plot.svg"))


def test_wide_range_of_perplexities_is_drawn_on_a_log_scale(tmp_path: Path) -> None:
    plot_perplexity({"text": {1.0: 12.0, 0.0: 100.0}}, tmp_path / "narrow.svg")
    plot_perplexity({"text": {1.0: 12.0, 0.0: 3212.0}}, tmp_path / "wide.svg")
    assert "80" in texts(tmp_path / "narrow.svg")
    assert "80" not in texts(tmp_path / "wide.svg")


def test_zeros_name_the_mean_of_each_series(tmp_path: Path) -> None:
    plot_zeros({"before": [0.5, 0.7], "after": [0.9, 0.8]}, tmp_path / "plot.svg")
    assert {"before (mean 60.0%)", "after (mean 85.0%)"} <= set(texts(tmp_path / "plot.svg"))


@pytest.mark.parametrize(
    "plot",
    [
        lambda path: plot_quality_diversity([], path),
        lambda path: plot_best_of_n([], path),
        lambda path: plot_perplexity({"text": {}}, path),
        lambda path: plot_zeros({}, path),
        lambda path: plot_zeros({"relu": []}, path),
        lambda path: plot_zeros({"relu": [0.5], "tuned": [0.5, 0.6]}, path),
    ],
)
def test_nothing_to_draw_is_an_error(plot: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(PlotError, match=r"no results|no perplexity|no zeros|different numbers"):
        plot(tmp_path / "plot.svg")
    assert list(tmp_path.iterdir()) == []
