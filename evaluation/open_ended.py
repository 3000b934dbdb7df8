"""Diversity of the samples of any prompts, where there is no right answer; and how far they go from greedy SILU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine import LLM
from evaluation.agreement import Agreement, mean_agreement, measure_agreement
from evaluation.answers import draw_samples, question_seed
from evaluation.controls import GREEDY_SILU, Control
from evaluation.diversity import Diversity, mean_diversity, measure_diversity

DEFAULT_SAMPLES = 16
DEFAULT_MAX_TOKENS = 64

Progress = Callable[[str, int, int], None]  # (label of the control, prompts done, prompts in all)


@dataclass(frozen=True, slots=True)
class OpenEndedResult:
    """Samples of one control.

    Attributes:
        control: The control.
        prompts: Number of prompts.
        samples: Samples of each.
        diversity: Mean over prompts.
        agreement: With the greedy SILU text, token by token; mean over prompts.
        texts: The samples of each prompt.
    """

    control: Control
    prompts: int
    samples: int
    diversity: Diversity
    agreement: Agreement
    texts: tuple[tuple[str, ...], ...]

    def to_json(self, with_texts: bool = False) -> dict[str, Any]:
        """Plain values; all samples too if wanted."""
        record: dict[str, Any] = {
            "control": self.control.to_json(),
            "prompts": self.prompts,
            "samples": self.samples,
            "diversity": self.diversity.to_json(),
            "agreement": self.agreement.to_json(),
        }
        return record | {"texts": [list(texts) for texts in self.texts]} if with_texts else record


def measure_prompts(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    controls: Sequence[Control],
    samples: int = DEFAULT_SAMPLES,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[OpenEndedResult]:
    """Sample texts with each control and measure how different they are.

    Args:
        llm: The model; with `allow_untuned_activations` if a control needs that.
        prompts: Token ids of each prompt, at least one.
        controls: What is compared.
        samples: Samples of each prompt, 1 to 128.
        max_tokens: Longest text.
        seed: The same seed gives the same samples; each prompt's own is derived from it.
        progress: Called whenever a prompt is finished.

    Returns:
        One result for each control, in order.

    Raises:
        ValueError: There are no prompts.
        InvalidRequest: The engine refuses a prompt, an activation or the number of samples.
    """
    if not prompts:
        raise ValueError("an evaluation needs at least one prompt")
    greedy = replace(GREEDY_SILU.sampling, max_tokens=max_tokens)
    references = [output.samples[0].token_ids for output in llm.generate(prompts, greedy, GREEDY_SILU.activation)]
    seeds = [question_seed(seed, str(list(prompt))) for prompt in prompts]
    results = []
    for control in controls:
        texts: list[tuple[str, ...]] = [()] * len(prompts)
        agreements: dict[int, Agreement] = {}
        for index, drawn in draw_samples(llm, prompts, seeds, control, samples, max_tokens=max_tokens):
            texts[index] = tuple(sample.text for sample in drawn) * (samples // len(drawn))
            agreements[index] = measure_agreement([sample.token_ids for sample in drawn], references[index])
            if progress is not None:
                progress(control.label, len(agreements), len(prompts))
        agreement = mean_agreement([agreements[index] for index in range(len(prompts))])
        diversity = mean_diversity([measure_diversity(each) for each in texts])
        results.append(OpenEndedResult(control, len(prompts), samples, diversity, agreement, tuple(texts)))
    return results
