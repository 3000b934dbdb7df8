"""Questions to prompts, and prompts to sampled answers, batched through the engine."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from engine import LLM, RequestOutput, SampleOutput
from evaluation.controls import Control

INSTRUCTION = "Answer in a few words."
MAX_ANSWER_TOKENS = 24
END_OF_ANSWER = "\n"

PromptBuilder = Callable[[LLM, str], list[int]]  # (model, question) -> token ids


def chat_prompt(llm: LLM, question: str) -> list[int]:
    """The question as a user's message, with an instruction to be brief.

    Raises:
        InvalidRequest: The model has no chat template; use `few_shot_prompt`.
    """
    # One message, for some templates refuse a system message.
    return llm.tokenizer.encode_chat([{"role": "user", "content": f"{question} {INSTRUCTION}"}])


def few_shot_prompt(examples: Sequence[tuple[str, str]]) -> PromptBuilder:
    """A prompt for models without a chat template: solved (question, answer) pairs before the question."""
    solved = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in examples)

    def build(llm: LLM, question: str) -> list[int]:
        return llm.tokenizer.encode(f"{solved}Question: {question}\nAnswer:")

    return build


def question_seed(seed: int, question: str) -> int:
    """Seed of a question's samples: a 64-bit hash of both, so that it does not depend on the other questions."""
    return int.from_bytes(blake2b(f"{seed}:{question}".encode(), digest_size=8).digest(), "little", signed=True)


def sample_answers(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    control: Control,
    samples: int,
    max_tokens: int = MAX_ANSWER_TOKENS,
) -> Iterator[tuple[int, list[str]]]:
    """Sample answers to many prompts; each answer ends at the first newline.

    Args:
        llm: The model.
        prompts: Token ids of each prompt.
        seeds: Seed of each prompt. One for all would give every question the same noise: a lucky sample would be
            lucky for all of them, and the error over questions would be too small.
        control: How tokens are drawn and the activation.
        samples: Answers for each prompt, 1 to 128.
        max_tokens: Cut answers after this many tokens.

    Yields:
        (index of the prompt, its `samples` answers) as prompts are finished, which is not always in order.

    Raises:
        InvalidRequest: The engine refuses a prompt, the activation or the number of samples.
    """
    limits = {"max_tokens": max_tokens, "min_tokens": 0, "stop": END_OF_ANSWER}
    for index, drawn in draw_samples(llm, prompts, seeds, control, samples, **limits):
        yield index, [sample.text.strip() for sample in drawn] * (samples // len(drawn))


def draw_samples(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    control: Control,
    samples: int,
    **limits: Any,
) -> Iterator[tuple[int, list[SampleOutput]]]:
    """Sample texts to many prompts together, each prompt with its own seed.

    Args:
        llm: The model.
        prompts: Token ids of each prompt.
        seeds: Seed of each prompt.
        control: How tokens are drawn and the activation.
        samples: Samples of each prompt, 1 to 128.
        limits: What else the evaluation sets of the control's `SamplingParams`.

    Yields:
        (index of the prompt, its samples) as prompts are finished, which is not always in order. A control that draws
        nothing gives equal samples: one is computed and handed out.

    Raises:
        InvalidRequest: As `sample_answers`.
    """
    drawn = samples if control.draws else 1
    base = replace(control.sampling, n=drawn, **limits)
    streams = (
        llm.stream(prompt, replace(base, seed=seed), control.activation)
        for prompt, seed in zip(prompts, seeds, strict=True)
    )
    # Twice a full batch, so that the next prompts' samples take the places of answers that are finished.
    at_once = max(1, 2 * llm.config.max_num_seqs // drawn)
    for index, output in _read_in_turns(streams, at_once):
        yield index, sorted(output.samples, key=lambda sample: sample.index)


def greedy_answers(
    llm: LLM, prompts: Sequence[Sequence[int]], control: Control, max_tokens: int = MAX_ANSWER_TOKENS
) -> list[str]:
    """The one answer to each prompt of a control that draws nothing."""
    if control.draws:
        raise ValueError(f"'{control.label}' draws its answers at random")
    sampling = replace(control.sampling, n=1, seed=0, max_tokens=max_tokens, min_tokens=0, stop=END_OF_ANSWER)
    return [output.samples[0].text.strip() for output in llm.generate(prompts, sampling, control.activation)]


def _read_in_turns(streams: Iterator[Iterator[RequestOutput]], at_once: int) -> Iterator[tuple[int, RequestOutput]]:
    """Run streams to their ends, up to `at_once` of them together; yields the place of each and its whole output."""
    waiting = enumerate(streams)
    running: deque[tuple[int, Iterator[RequestOutput], RequestOutput]] = deque()
    while True:
        while len(running) < at_once and (entry := next(waiting, None)) is not None:
            index, stream = entry
            running.append((index, stream, next(stream)))
        if not running:
            return
        index, stream, output = running.popleft()
        if (piece := next(stream, None)) is None:
            yield index, output
        else:
            output.extend(piece)
            running.append((index, stream, output))
