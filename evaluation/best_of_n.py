"""Best-of-N accuracy on open questions, with diversity and agreement of the same samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import fmean, stdev
from typing import Any

from engine import LLM
from evaluation.agreement import Agreement, mean_agreement, measure_agreement
from evaluation.answers import (
    MAX_ANSWER_TOKENS,
    PromptBuilder,
    chat_prompt,
    greedy_answers,
    question_seed,
    sample_answers,
)
from evaluation.controls import GREEDY_SILU, Control
from evaluation.diversity import Diversity, mean_diversity, measure_diversity
from evaluation.questions import Question

DEFAULT_SAMPLES = 32

Progress = Callable[[str, int, int], None]  # (label of the control, questions done, questions in all)


@dataclass(frozen=True, slots=True)
class BestOf:
    """Accuracy of the best of `n` samples: the share of questions that at least one of them answers.

    Attributes:
        n: Samples that the best is taken of.
        accuracy: Mean over questions of the unbiased estimate.
        stderr: Standard error over questions; None for a single question.
    """

    n: int
    accuracy: float
    stderr: float | None

    def to_json(self) -> dict[str, Any]:
        """Fields by name."""
        return {"n": self.n, "accuracy": self.accuracy, "stderr": self.stderr}


@dataclass(frozen=True, slots=True)
class ControlResult:
    """What one control's samples are worth.

    Attributes:
        control: The control.
        questions: Number of questions.
        samples: Samples for each question.
        seed: Seed of the evaluation.
        best_of: Best-of-N accuracy where an accepted answer must occur in the sample, N = 1, 2, 4, ...
        exact: The same where the sample must be an accepted answer and nothing else.
        by_category: `best_of` of each category of questions.
        diversity: Mean over questions.
        agreement: With the greedy SILU answer, mean over questions.
        answers: The samples of each question.
    """

    control: Control
    questions: int
    samples: int
    seed: int
    best_of: tuple[BestOf, ...]
    exact: tuple[BestOf, ...]
    by_category: dict[str, tuple[BestOf, ...]]
    diversity: Diversity
    agreement: Agreement
    answers: tuple[tuple[str, ...], ...]

    def accuracy(self, n: int) -> float:
        """Best-of-`n` accuracy.

        Raises:
            KeyError: `n` was not measured.
        """
        return {entry.n: entry.accuracy for entry in self.best_of}[n]

    def to_json(self, with_answers: bool = False) -> dict[str, Any]:
        """Plain values; all samples too if wanted."""
        record: dict[str, Any] = {
            "control": self.control.to_json(),
            "questions": self.questions,
            "samples": self.samples,
            "seed": self.seed,
            "best_of": [entry.to_json() for entry in self.best_of],
            "exact": [entry.to_json() for entry in self.exact],
            "by_category": {name: [entry.to_json() for entry in found] for name, found in self.by_category.items()},
            "diversity": self.diversity.to_json(),
            "agreement": self.agreement.to_json(),
        }
        return record | {"answers": [list(texts) for texts in self.answers]} if with_answers else record


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of `k` samples is correct, estimated from `correct` of `samples`, unbiased.

    1 - C(samples - correct, k) / C(samples, k), Chen et al. 2021 (arXiv 2107.03374), equation 1.

    Raises:
        ValueError: Not 0 <= correct <= samples, or not 1 <= k <= samples.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"needs 0 <= correct <= samples and 1 <= k <= samples, got samples {samples}, correct {correct}, k {k}"
        )
    return 1 - comb(samples - correct, k) / comb(samples, k)


def best_of_n(correct: Sequence[int], samples: int) -> tuple[BestOf, ...]:
    """Best-of-N accuracy for N = 1, 2, 4, ... up to `samples`.

    Args:
        correct: Correct samples of each question.
        samples: Samples of each question.
    """
    curve = []
    for n in (1 << power for power in range(samples.bit_length())):
        values = [pass_at_k(samples, count, n) for count in correct]
        stderr = stdev(values) / sqrt(len(values)) if len(values) > 1 else None
        curve.append(BestOf(n, fmean(values), stderr))
    return tuple(curve)


def score_control(
    control: Control,
    questions: Sequence[Question],
    answers: Sequence[Sequence[str]],
    references: Sequence[str],
    encode: Callable[[str], Sequence[int]],
    seed: int = 0,
) -> ControlResult:
    """Quality, diversity and agreement of samples that are there already.

    Args:
        control: What made the samples.
        questions: At least one question.
        answers: Samples of each question, the same number for each.
        references: The greedy SILU answer to each question.
        encode: Token ids of an answer's text. Agreement is that of texts cut at the newline, as tokens: whether a
            sample ended by a newline or an end-of-sequence token makes no difference.
        seed: Seed that the samples were made with.
    """
    samples = len(answers[0])
    contained = [
        sum(question.contained_in(text) for text in texts) for question, texts in zip(questions, answers, strict=True)
    ]
    exact = [sum(question.equals(text) for text in texts) for question, texts in zip(questions, answers, strict=True)]
    categories: dict[str, list[int]] = {}
    for question, count in zip(questions, contained, strict=True):
        categories.setdefault(question.category, []).append(count)
    agreements = [
        measure_agreement([encode(text) for text in texts], encode(reference))
        for texts, reference in zip(answers, references, strict=True)
    ]
    return ControlResult(
        control=control,
        questions=len(questions),
        samples=samples,
        seed=seed,
        best_of=best_of_n(contained, samples),
        exact=best_of_n(exact, samples),
        by_category={name: best_of_n(counts, samples) for name, counts in categories.items()},
        diversity=mean_diversity([measure_diversity(texts) for texts in answers]),
        agreement=mean_agreement(agreements),
        answers=tuple(tuple(texts) for texts in answers),
    )


def evaluate_controls(
    llm: LLM,
    questions: Sequence[Question],
    controls: Sequence[Control],
    samples: int = DEFAULT_SAMPLES,
    *,
    prompt: PromptBuilder = chat_prompt,
    max_tokens: int = MAX_ANSWER_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
    finished: Callable[[ControlResult], None] | None = None,
) -> list[ControlResult]:
    """Sample answers with each control and measure them.

    Args:
        llm: The model; with `allow_untuned_activations` if a control needs that.
        questions: At least one question.
        controls: What is compared.
        samples: Samples for each question, 1 to 128.
        prompt: Makes a prompt of a question.
        max_tokens: Longest answer.
        seed: Same seed, same samples: each question's own seed is derived from it.
        progress: Called whenever a question is finished.
        finished: Called with each result as soon as it is there, so that a long run can save it.

    Returns:
        One result for each control, in order.

    Raises:
        ValueError: There are no questions or no controls, or two controls have the same label.
        UntunedActivation: The checkpoint does not support a control's activation; nothing was generated.
        InvalidRequest: The engine refuses a prompt or the number of samples.
    """
    if not questions or not controls:
        raise ValueError("an evaluation needs at least one question and one control")
    if len({control.label for control in controls}) < len(controls):
        raise ValueError("two controls have the same label")
    if not llm.config.allow_untuned_activations:
        for control in controls:
            llm.info.support.check(control.activation)
    prompts = [prompt(llm, question.question) for question in questions]
    seeds = [question_seed(seed, question.question) for question in questions]
    references = greedy_answers(llm, prompts, GREEDY_SILU, max_tokens)

    def encode(text: str) -> list[int]:
        return llm.tokenizer.encode(text, add_special_tokens=False)

    results = []
    for control in controls:
        answers: list[list[str]] = [[] for _ in questions]
        sampled = sample_answers(llm, prompts, seeds, control, samples, max_tokens)
        for done, (index, texts) in enumerate(sampled, 1):
            answers[index] = texts
            if progress is not None:
                progress(control.label, done, len(questions))
        results.append(score_control(control, questions, answers, references, encode, seed))
        if finished is not None:
            finished(results[-1])
    return results
