"""Diversity of any prompts' samples, on a tiny model."""

from collections.abc import Iterator

import pytest

from engine import LLM, Activation, SamplingParams
from evaluation.agreement import measure_agreement
from evaluation.controls import Control, stochastic_control, temperature_control
from evaluation.diversity import measure_diversity
from evaluation.open_ended import measure_prompts
from tests.engine.models.tiny import make_tiny
from tests.evaluation.tiny_text import tiny_config

pytest.importorskip("sacrebleu")
PROMPTS = [[5, 6, 7], [9, 10, 11, 12]]
GREEDY = Control("greedy", "greedy", sampling=SamplingParams(temperature=0.0))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("tiny")
    make_tiny("llama", path)
    with LLM(config=tiny_config(path)) as llm:
        yield llm


def test_figures_are_those_of_the_samples_that_come_with_them(llm: LLM) -> None:
    (result,) = measure_prompts(llm, PROMPTS[:1], [temperature_control(1.0)], samples=4, max_tokens=12)

    assert (result.prompts, result.samples) == (1, 4)
    assert len(set(result.texts[0])) > 1
    assert result.diversity == measure_diversity(result.texts[0])
    greedy = llm.generate(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=12))[0].samples[0]
    assert result.agreement.reference_tokens == len(greedy.token_ids)


def test_greedy_silu_agrees_with_itself_and_is_not_diverse(llm: LLM) -> None:
    (result,) = measure_prompts(llm, PROMPTS, [GREEDY], samples=3, max_tokens=8)

    assert [len(texts) for texts in result.texts] == [3, 3]
    assert result.diversity.unique == pytest.approx(1 / 3)
    assert result.agreement == measure_agreement([[1] * 8], [1] * 8)


def test_the_same_seed_gives_the_same_samples_and_another_one_others(llm: LLM) -> None:
    controls = [stochastic_control(0.3), temperature_control(1.0)]
    first, again, other = (
        measure_prompts(llm, PROMPTS, controls, samples=3, max_tokens=10, seed=seed) for seed in (1, 1, 2)
    )

    assert first == again
    assert [result.texts for result in first] != [result.texts for result in other]


def test_progress_and_json(llm: LLM) -> None:
    seen: list[tuple[str, int, int]] = []

    (result,) = measure_prompts(llm, PROMPTS, [GREEDY], samples=1, max_tokens=4, progress=lambda *x: seen.append(x))

    assert seen == [("greedy", 1, 2), ("greedy", 2, 2)]
    assert "texts" not in result.to_json()
    assert result.to_json(with_texts=True)["texts"] == [list(texts) for texts in result.texts]


def test_no_prompts_are_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        measure_prompts(llm, [], [Control("x", "x", activation=Activation())])
