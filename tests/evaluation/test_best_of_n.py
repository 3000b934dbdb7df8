"""Best-of-N: the estimator, scoring, and whole evaluations of a tiny model."""

import json
from collections.abc import Iterator
from itertools import combinations
from math import sqrt
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import (
    LLM,
    Activation,
    ActivationMode,
    DType,
    EngineConfig,
    InvalidRequest,
    SamplingParams,
    Scope,
    UntunedActivation,
)
from evaluation.answers import (
    END_OF_ANSWER,
    INSTRUCTION,
    chat_prompt,
    few_shot_prompt,
    greedy_answers,
    question_seed,
    sample_answers,
)
from evaluation.best_of_n import (
    BestOf,
    ControlResult,
    best_of_n,
    evaluate_controls,
    pass_at_k,
    score_control,
)
from evaluation.controls import GREEDY_SILU, Control, stochastic_control, temperature_control
from evaluation.questions import Question
from tests.engine.models.tiny import make_tiny

CONFIG = EngineConfig(dtype=DType.FLOAT32, kv_cache_mib=4, threads=1, allow_untuned_activations=True)
QUESTIONS = [Question(f"Is {word} a word?", ("e", "h"), word[0]) for word in ("tree", "hat", "tin", "rain", "hen")]
RELU = Control("relu", "relu", sampling=SamplingParams(temperature=0.0), activation=Activation(ActivationMode.RELU))
CONTROLS = [
    temperature_control(1.0),
    stochastic_control(0.5),
    stochastic_control(0.5, 0.7, Scope.DECODE),
    RELU,
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-model")
    make_tiny("llama", path)
    return path


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(str(model), config=CONFIG) as llm:
        yield llm


@pytest.fixture(scope="module")
def results(llm: LLM) -> list[ControlResult]:
    return evaluate_controls(llm, QUESTIONS, CONTROLS, samples=4, max_tokens=8)


class TestEstimator:
    @given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
    def test_is_the_share_of_subsets_with_a_correct_sample(self, case: tuple[int, int, int]) -> None:
        samples, correct, k = case
        subsets = list(combinations(range(samples), k))
        share = sum(any(place < correct for place in subset) for subset in subsets) / len(subsets)
        assert pass_at_k(samples, correct, k) == pytest.approx(share)

    @pytest.mark.parametrize(("samples", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
    def test_refuses_what_cannot_be(self, samples: int, correct: int, k: int) -> None:
        with pytest.raises(ValueError, match="needs 0 <= correct"):
            pass_at_k(samples, correct, k)

    def test_curve_doubles_n_and_has_the_error_over_questions(self) -> None:
        curve = best_of_n([0, 2, 4], samples=4)
        assert [entry.n for entry in curve] == [1, 2, 4]
        assert [entry.accuracy for entry in curve] == pytest.approx([1 / 2, (0 + 5 / 6 + 1) / 3, 2 / 3])
        assert curve[0].stderr == pytest.approx(0.5 / sqrt(3))

    @pytest.mark.parametrize(("samples", "last"), [(1, 1), (3, 2), (32, 32), (33, 32)])
    def test_n_stays_within_the_samples(self, samples: int, last: int) -> None:
        assert best_of_n([1], samples)[-1].n == last

    def test_single_question_has_no_error(self) -> None:
        assert best_of_n([1], samples=2) == (BestOf(1, 0.5, None), BestOf(2, 1.0, None))

    @given(st.lists(st.integers(0, 16), min_size=1, max_size=5))
    def test_more_samples_are_never_worse(self, correct: list[int]) -> None:
        accuracies = [entry.accuracy for entry in best_of_n(correct, samples=16)]
        assert accuracies == sorted(accuracies)
        assert accuracies[-1] == sum(count > 0 for count in correct) / len(correct)


class TestScoring:
    QUESTIONS = (Question("Capital of France?", ("Paris",), "capital"), Question("2 + 2?", ("4", "four"), "sum"))

    def score(self) -> ControlResult:
        answers = [["Paris", "It is Paris.", "Rome", "Paris"], ["five", "22", "4.", "six"]]
        return score_control(
            GREEDY_SILU, self.QUESTIONS, answers, ["Paris", "five"], encode=lambda text: list(text.encode()), seed=7
        )

    def test_counts_answers_in_the_text_and_alone(self) -> None:
        result = self.score()
        assert result.accuracy(1) == (3 / 4 + 1 / 4) / 2
        assert result.accuracy(4) == 1.0
        assert result.exact[0].accuracy == (2 / 4 + 1 / 4) / 2

    def test_reports_each_category(self) -> None:
        accuracy = {name: curve[0].accuracy for name, curve in self.score().by_category.items()}
        assert accuracy == {"capital": 3 / 4, "sum": 1 / 4}

    def test_measures_diversity_and_agreement_of_the_same_samples(self) -> None:
        result = self.score()
        assert result.diversity.unique == (3 / 4 + 4 / 4) / 2
        assert result.agreement.equal == (2 / 4 + 1 / 4) / 2

    def test_json_has_plain_values_and_the_answers_on_request(self) -> None:
        record = self.score().to_json(with_answers=True)
        assert json.loads(json.dumps(record)) == record
        assert record["answers"][1] == ["five", "22", "4.", "six"]
        assert "answers" not in self.score().to_json()


class TestPrompts:
    def test_chat_prompt_is_the_template_with_an_instruction(self, llm: LLM) -> None:
        text = llm.tokenizer.decode(chat_prompt(llm, "Is it a hat?"), skip_special_tokens=False)
        assert text == f"<|im_start|>user\nIs it a hat? {INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"

    def test_few_shot_prompt_shows_solved_questions(self, llm: LLM) -> None:
        build = few_shot_prompt([("1 + 1?", "2"), ("2 + 2?", "4")])
        text = llm.tokenizer.decode(build(llm, "3 + 3?"))
        assert text == "Question: 1 + 1?\nAnswer: 2\n\nQuestion: 2 + 2?\nAnswer: 4\n\nQuestion: 3 + 3?\nAnswer:"

    def test_seed_depends_on_question_and_seed(self) -> None:
        seeds = {question_seed(seed, text) for seed in (0, 1) for text in ("a", "b", "1:a")}
        assert len(seeds) == 6
        assert SamplingParams(seed=question_seed(0, "a")).seed == question_seed(0, "a")


class TestSampling:
    @pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.label)
    def test_gives_what_generate_gives(self, llm: LLM, control: Control) -> None:
        prompts = [chat_prompt(llm, question.question) for question in QUESTIONS]
        sampled = dict(sample_answers(llm, prompts, range(5), control, samples=3, max_tokens=8))
        assert sorted(sampled) == [0, 1, 2, 3, 4]
        for index, prompt in enumerate(prompts):
            sampling = SamplingParams(
                temperature=control.sampling.temperature, seed=index, n=3, max_tokens=8, stop=END_OF_ANSWER
            )
            (output,) = llm.generate(prompt, sampling, control.activation)
            assert sampled[index] == [sample.text.strip() for sample in output.samples]

    def test_more_prompts_than_run_at_once_are_all_answered(self, model: Path) -> None:
        with LLM(
            str(model), config=EngineConfig(dtype=DType.FLOAT32, kv_cache_mib=4, threads=1, max_num_seqs=2)
        ) as llm:
            prompts = [[5 + place] for place in range(7)]
            sampled = list(sample_answers(llm, prompts, range(7), temperature_control(1.0), samples=3, max_tokens=6))
            assert sorted(index for index, _ in sampled) == list(range(7))
            assert all(len(answers) == 3 for _, answers in sampled)
            assert llm.stats().running == llm.stats().waiting == 0

    def test_nothing_runs_on_when_the_caller_leaves(self, llm: LLM) -> None:
        sampled = sample_answers(llm, [[5], [6], [7]], range(3), temperature_control(1.0), samples=40, max_tokens=8)
        next(sampled)
        sampled.close()  # type: ignore[attr-defined]
        assert llm.stats().running == llm.stats().waiting == 0

    def test_control_that_draws_nothing_is_computed_once(self, llm: LLM) -> None:
        before = llm.stats().generated_tokens
        ((_, answers),) = sample_answers(llm, [[5, 6]], [0], RELU, samples=8, max_tokens=4)
        assert llm.stats().generated_tokens - before <= 4
        assert len(answers) == 8
        assert len(set(answers)) == 1

    def test_random_control_has_no_greedy_answer(self, llm: LLM) -> None:
        with pytest.raises(ValueError, match="draws its answers"):
            greedy_answers(llm, [[5]], temperature_control(1.0))


class TestEvaluation:
    def test_same_seed_gives_the_same_result_and_another_one_does_not(
        self, llm: LLM, results: list[ControlResult]
    ) -> None:
        assert evaluate_controls(llm, QUESTIONS, CONTROLS, samples=4, max_tokens=8) == results
        other = evaluate_controls(llm, QUESTIONS, CONTROLS, samples=4, max_tokens=8, seed=1)
        for first, second in zip(results, other, strict=True):
            assert (first.answers != second.answers) is first.control.draws

    def test_samples_of_a_question_do_not_depend_on_the_others(self, llm: LLM, results: list[ControlResult]) -> None:
        alone = evaluate_controls(llm, QUESTIONS[2:3], CONTROLS[:2], samples=4, max_tokens=8)
        assert [result.answers[0] for result in alone] == [result.answers[2] for result in results[:2]]

    def test_random_controls_differ_between_samples_and_fixed_ones_do_not(self, results: list[ControlResult]) -> None:
        assert [result.control.label for result in results] == [control.label for control in CONTROLS]
        for result in results:
            assert (result.questions, result.samples) == (5, 4)
            assert all(len(texts) == 4 for texts in result.answers)
            assert (result.diversity.unique > 1 / 4) is result.control.draws
            assert set(result.by_category) == {"t", "h", "r"}

    def test_greedy_silu_agrees_with_itself(self, llm: LLM) -> None:
        (result,) = evaluate_controls(llm, QUESTIONS, [GREEDY_SILU], samples=2, max_tokens=8)
        assert result.agreement.equal == result.agreement.token_agreement == 1.0
        assert result.agreement.common_prefix == result.agreement.reference_tokens > 0

    def test_prompt_with_silu_makes_the_first_greedy_token_the_same(self, llm: LLM) -> None:
        controls = [stochastic_control(0.5, scope=scope) for scope in (Scope.DECODE, Scope.ALL)]
        decode, everything = evaluate_controls(llm, QUESTIONS, controls, samples=8, max_tokens=1)
        assert decode.agreement.equal == 1.0
        assert everything.agreement.equal < 1.0

    def test_tells_how_far_it_is_and_hands_out_each_result(self, llm: LLM) -> None:
        calls: list[tuple[str, int, int]] = []
        finished: list[ControlResult] = []
        results = evaluate_controls(
            llm,
            QUESTIONS[:2],
            CONTROLS[:2],
            samples=2,
            max_tokens=4,
            progress=lambda *call: calls.append(call),
            finished=finished.append,
        )
        assert calls == [(control.label, done, 2) for control in CONTROLS[:2] for done in (1, 2)]
        assert finished == results

    def test_untuned_activation_is_refused_before_anything_runs(self, model: Path) -> None:
        with LLM(str(model), config=EngineConfig(dtype=DType.FLOAT32, kv_cache_mib=4, threads=1)) as llm:
            with pytest.raises(UntunedActivation):
                evaluate_controls(llm, QUESTIONS, [temperature_control(1.0), RELU], samples=2)
            assert llm.stats().steps == 0

    def test_too_many_samples_are_refused(self, llm: LLM) -> None:
        with pytest.raises(InvalidRequest, match="n must be"):
            evaluate_controls(llm, QUESTIONS[:1], CONTROLS[:1], samples=129, max_tokens=2)

    @pytest.mark.parametrize(
        ("questions", "controls"),
        [([], CONTROLS), (QUESTIONS, []), (QUESTIONS, [RELU, RELU])],
        ids=["no questions", "no controls", "one control twice"],
    )
    def test_needs_questions_and_different_controls(
        self, llm: LLM, questions: list[Question], controls: list[Control]
    ) -> None:
        with pytest.raises(ValueError, match=r"at least one|same label"):
            evaluate_controls(llm, questions, controls)
