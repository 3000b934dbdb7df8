"""Windows of text through the engine, each stochastic pass with draws of its own."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from engine import LLM, Activation, ActivationMode, PromptScore
from evaluation.texts import TextWindows

BATCH = 16  # windows that are handed to the engine together, between two reports of progress

Progress = Callable[[int, int], None]  # (windows done, windows in all)


def score_windows(
    llm: LLM,
    text: TextWindows,
    activation: Activation,
    *,
    seeds: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[list[PromptScore]]:
    """Score all windows, `seeds` times with new draws in stochastic mode and once in the others.

    Window `w` of pass `s` draws with the seed `seed + s * windows + w`: with one seed for all, the same neurons would
    be zeroed at the same place of every window, and an error over windows would be too small.

    Args:
        llm: The model.
        text: The windows.
        activation: Its own seed is not used.
        seeds: Passes in stochastic mode.
        seed: First seed.
        progress: Called after each batch.

    Yields:
        For each pass the score of each window.

    Raises:
        InvalidRequest: The engine refuses a window or the activation.
    """
    stochastic = activation.mode is ActivationMode.STOCHASTIC
    passes, windows = seeds if stochastic else 1, len(text.windows)
    for number in range(passes):
        scores: list[PromptScore] = []
        for first in range(0, windows, BATCH):
            batch = text.windows[first : first + BATCH]
            own = [seed + number * windows + first + i for i in range(len(batch))]
            scores += llm.score(batch, [replace(activation, seed=one if stochastic else None) for one in own])
            if progress is not None:
                progress(number * windows + len(scores), passes * windows)
        yield scores
