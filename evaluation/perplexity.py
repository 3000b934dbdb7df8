"""Perplexity of texts, by activation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine import LLM, Activation
from evaluation.grid import describe
from evaluation.scoring import Progress, score_windows
from evaluation.texts import TextWindows


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """How well a model with one activation predicts a text.

    Attributes:
        text: Name of the text.
        activation: The activation; draws have seeds of their own.
        passes: Times that the text was read: the number of seeds in stochastic mode, else 1.
        window_nll: Negative log-likelihood of each window in nats, mean over passes; NaN where logits are not finite.
        window_tokens: Tokens of each window that are counted.
    """

    text: str
    activation: Activation
    passes: int
    window_nll: tuple[float, ...]
    window_tokens: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that are counted in one pass."""
        return sum(self.window_tokens)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a token in nats."""
        return mean_per_token(self.window_nll, self.window_tokens)[0]

    @property
    def nll_stderr(self) -> float | None:
        """Its standard error over windows; None for a single window."""
        return mean_per_token(self.window_nll, self.window_tokens)[1]

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return _exp(self.nll)

    @property
    def stderr(self) -> float | None:
        """Standard error of the perplexity, to first order."""
        return None if self.nll_stderr is None else self.perplexity * self.nll_stderr

    def ratio_to(self, base: "PerplexityResult") -> tuple[float, float | None]:
        """Perplexity in units of another one on the same windows, such as that of SILU, and its standard error.

        The error is that of differences window by window: most of what makes a window hard is hard for both, so it is
        far smaller than the errors of the two perplexities.

        Raises:
            ValueError: The windows differ.
        """
        if self.window_tokens != base.window_tokens:
            raise ValueError(f"'{self.text}' and '{base.text}' were not measured on the same windows")
        differences = [mine - other for mine, other in zip(self.window_nll, base.window_nll, strict=True)]
        mean, error = mean_per_token(differences, self.window_tokens)
        return _exp(mean), None if error is None else _exp(mean) * error

    def to_json(self) -> dict[str, Any]:
        """Fields and derived figures as plain values."""
        return {
            "text": self.text,
            "activation": describe(self.activation),
            "mode": str(self.activation.mode),
            "p": self.activation.p,
            "passes": self.passes,
            "windows": len(self.window_tokens),
            "tokens": self.tokens,
            "nll": self.nll,
            "nll_stderr": self.nll_stderr,
            "perplexity": self.perplexity,
            "stderr": self.stderr,
        }


def measure_perplexity(
    llm: LLM,
    text: TextWindows,
    activation: Activation,
    *,
    seeds: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Measure one text with one activation.

    Args:
        llm: The model.
        text: The text's windows.
        activation: Its own seed is not used; its scope must be `all`.
        seeds: Passes with different draws in stochastic mode.
        seed: The same seed gives the same figures.
        progress: Called now and then with (windows done, windows in all).

    Raises:
        InvalidRequest: The engine refuses the activation.
    """
    sums = [0.0] * len(text.windows)
    passes = 0
    for scores in score_windows(llm, text, activation, seeds=seeds, seed=seed, progress=progress):
        passes += 1
        for window, score in enumerate(scores):
            sums[window] -= math.fsum(score.logprobs)
    counts = tuple(len(window) - 1 for window in text.windows)
    return PerplexityResult(text.name, activation, passes, tuple(total / passes for total in sums), counts)


def mean_per_token(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Mean of a quantity per token, and its standard error over windows.

    The mean is a ratio, `sum(sums) / sum(counts)`, for windows may differ in length. Its error is that of a ratio
    estimator: `sqrt(W / (W - 1) * sum((sums_w - mean * counts_w)**2)) / sum(counts)` for `W` windows.

    Args:
        sums: Sum over the tokens of each window, at least one window.
        counts: Tokens of each window.

    Returns:
        Mean and standard error; None for a single window, which says nothing about others.
    """
    total, windows = sum(counts), len(counts)
    mean = math.fsum(sums) / total
    if windows == 1:
        return mean, None
    squares = math.fsum((value - mean * count) ** 2 for value, count in zip(sums, counts, strict=True))
    return mean, math.sqrt(windows / (windows - 1) * squares) / total


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
