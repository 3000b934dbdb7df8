"""Perplexity against transformers, and its error against simulation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from engine import LLM, Activation, InvalidRequest
from evaluation.perplexity import PerplexityResult, mean_per_token, measure_perplexity
from evaluation.scoring import BATCH
from evaluation.texts import TextWindows
from tests.engine.models.tiny import make_tiny
from tests.evaluation.tiny_text import tiny_config, windows

STOCHASTIC = Activation("stochastic", p=0.5)


@dataclass(frozen=True)
class Subject:
    llm: LLM
    model: PreTrainedModel


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    path: Path = tmp_path_factory.mktemp("tiny")
    model = make_tiny("llama", path)
    with LLM(config=tiny_config(path)) as llm:
        yield Subject(llm, model)


def test_equals_the_loss_of_transformers(subject: Subject) -> None:
    text = windows(40, 60, 7)
    with torch.inference_mode():
        losses = [
            subject.model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() * (len(ids) - 1)
            for ids in text.windows
        ]

    result = measure_perplexity(subject.llm, text, Activation())

    assert (result.text, result.window_tokens, result.tokens, result.passes) == ("noise", (39, 59, 6), 104, 1)
    assert result.nll == pytest.approx(sum(losses) / 104, abs=1e-4)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 104), rel=1e-4)


def test_a_stochastic_pass_draws_anew_for_each_window_and_pass(subject: Subject) -> None:
    same = TextWindows("same", (windows(30).windows[0],) * 3)

    one, other = (measure_perplexity(subject.llm, same, STOCHASTIC, seeds=2, seed=seed) for seed in (5, 5 + 6))

    seeds = [Activation("stochastic", p=0.5, seed=5 + i) for i in range(6)]
    each = [-sum(score.logprobs) for score in subject.llm.score([same.windows[0]] * 6, seeds)]
    assert len(set(each)) == 6
    assert one.nll == pytest.approx(sum(each) / (6 * 29), rel=1e-12)
    assert one.passes == 2
    assert one.nll_stderr is not None
    assert one.nll_stderr > 0
    assert one.nll != other.nll


def test_modes_that_draw_nothing_are_read_once(subject: Subject) -> None:
    assert measure_perplexity(subject.llm, windows(30), Activation("relu"), seeds=5).passes == 1


def test_the_same_seed_gives_the_same_figures(subject: Subject) -> None:
    text = windows(30, 20)
    first, again = (measure_perplexity(subject.llm, text, STOCHASTIC, seeds=2, seed=3) for _ in range(2))
    assert first == again


def test_progress_comes_batch_by_batch_over_all_passes(subject: Subject) -> None:
    seen: list[tuple[int, int]] = []
    count = BATCH + 2

    measure_perplexity(
        subject.llm, windows(*[3] * count), STOCHASTIC, seeds=2, progress=lambda *pair: seen.append(pair)
    )

    assert seen == [(BATCH, 2 * count), (count, 2 * count), (count + BATCH, 2 * count), (2 * count, 2 * count)]


def test_scope_decode_is_refused(subject: Subject) -> None:
    with pytest.raises(InvalidRequest, match=r"activation\.scope"):
        measure_perplexity(subject.llm, windows(5), Activation("relu", scope="decode"))


class TestMeanPerToken:
    def test_of_windows_of_one_length_is_the_plain_mean_with_its_plain_error(self) -> None:
        sums = [10.0, 14.0, 9.0, 11.0]

        mean, error = mean_per_token(sums, [5] * 4)

        per_token = np.array(sums) / 5
        assert mean == pytest.approx(per_token.mean())
        assert error == pytest.approx(per_token.std(ddof=1) / 2)

    def test_longer_windows_count_for_more(self) -> None:
        assert mean_per_token([10.0, 90.0], [10, 30])[0] == 2.5

    def test_one_window_has_no_error(self) -> None:
        assert mean_per_token([10.0], [5]) == (2.0, None)

    def test_the_error_is_the_spread_of_repeated_experiments(self) -> None:
        """Windows of different lengths, each with an offset of its own that all of its tokens share."""
        generator = np.random.default_rng(0)
        means, errors = [], []
        for _ in range(2000):
            counts = generator.integers(5, 40, 30)
            sums = counts * (3 + generator.normal(0, 0.5, 30))
            mean, error = mean_per_token(sums.tolist(), counts.tolist())
            means.append(mean)
            errors.append(error)

        assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)


class TestResult:
    """Four windows of 25 tokens."""

    def result(self, *nll: float) -> PerplexityResult:
        return PerplexityResult("x", STOCHASTIC, 2, tuple(25 * each for each in nll), (25,) * len(nll))

    def test_figures_are_those_of_its_windows(self) -> None:
        result = self.result(1.0, 3.0, 2.0, 2.0)

        error = math.sqrt(2 / 3 / 4)  # sample variance 2 / 3, four windows
        assert (result.tokens, result.nll) == (100, 2.0)
        assert result.nll_stderr == pytest.approx(error)
        assert result.perplexity == pytest.approx(math.exp(2))
        assert result.stderr == pytest.approx(math.exp(2) * error)

    def test_one_window_has_no_errors(self) -> None:
        result = self.result(2.0)
        assert (result.nll_stderr, result.stderr, result.ratio_to(result)[1]) == (None, None, None)

    def test_the_error_of_a_ratio_comes_from_differences(self) -> None:
        base = self.result(1.0, 9.0, 4.0, 2.0)
        worse = self.result(1.5, 9.5, 4.5, 2.5)

        ratio, error = worse.ratio_to(base)

        assert ratio == pytest.approx(math.exp(0.5))
        assert error == pytest.approx(0.0, abs=1e-12)
        assert self.result(1.5, 9.5, 4.5, 2.9).ratio_to(base)[1] == pytest.approx(math.exp(0.6) * 0.1)

    def test_results_of_other_windows_are_not_compared(self) -> None:
        with pytest.raises(ValueError, match="not measured on the same windows"):
            self.result(1.0).ratio_to(self.result(1.0, 2.0))

    def test_a_hopeless_model_has_infinite_perplexity(self) -> None:
        assert self.result(1000.0, 1001.0).perplexity == math.inf

    def test_json(self) -> None:
        record = self.result(2.0, 2.0).to_json()
        assert (record["activation"], record["windows"], record["tokens"]) == ("stochastic:0.5", 2, 50)
        assert record["perplexity"] == pytest.approx(math.exp(2))
