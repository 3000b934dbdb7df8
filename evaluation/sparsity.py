"""Zeros of the feed-forward layers, layer by layer, while a model reads a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine import LLM, Activation, ActivationMode, EngineStats
from evaluation.grid import describe, silu_share
from evaluation.scoring import Progress, score_windows
from evaluation.texts import TextWindows


@dataclass(frozen=True, slots=True)
class SparsityResult:
    """Zeros of one text with one activation.

    Attributes:
        text: Name of the text.
        activation: The activation; draws have seeds of their own.
        tokens: Tokens that ran through the layers.
        zeros: Of each layer the share of act(gate) that is exactly 0, in [0, 1].
    """

    text: str
    activation: Activation
    tokens: int
    zeros: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Share of zeros over all layers."""
        return sum(self.zeros) / len(self.zeros)

    @property
    def negative(self) -> tuple[float, ...] | None:
        """Of each layer the share of gate values below 0, as far as zeros tell; None where they do not.

        RELU makes every one of them 0, a stochastic activation the share 1 - p of them, so that dividing by it gives an
        estimate. SILU makes none.
        """
        dropped = 1.0 - silu_share(self.activation)
        return tuple(share / dropped for share in self.zeros) if dropped else None

    def to_json(self) -> dict[str, Any]:
        """Fields and derived figures as plain values."""
        return {
            "text": self.text,
            "activation": describe(self.activation),
            "mode": str(self.activation.mode),
            "p": self.activation.p,
            "tokens": self.tokens,
            "mean": self.mean,
            "zeros": self.zeros,
            "negative": self.negative,
        }


def measure_sparsity(
    llm: LLM,
    text: TextWindows,
    activation: Activation,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> SparsityResult:
    """Count zeros of one text with one activation. No other request may run in this mode meanwhile.

    Args:
        llm: The model.
        text: The text's windows.
        activation: Its own seed is not used; its scope must be `all`.
        seed: The same seed gives the same figures.
        progress: Called now and then with (windows done, windows in all).

    Raises:
        InvalidRequest: The engine refuses the activation.
    """
    before = llm.stats()
    for _ in score_windows(llm, text, activation, seed=seed, progress=progress):
        pass
    zeros = zero_shares(before, llm.stats(), activation.mode)
    return SparsityResult(text.name, activation, sum(map(len, text.windows)), zeros)


def zero_shares(before: EngineStats, after: EngineStats, mode: ActivationMode) -> tuple[float, ...]:
    """Share of zeros of each layer in what one mode computed between two snapshots.

    Raises:
        ValueError: The mode computed nothing.
    """

    def grown(counts: Sequence[int], counts_before: Sequence[int]) -> list[int]:
        return [now - then for now, then in zip(counts, counts_before, strict=True)]

    zeros = grown(after.ffn_zeros[mode], before.ffn_zeros[mode])
    elements = grown(after.ffn_elements[mode], before.ffn_elements[mode])
    if 0 in elements:
        raise ValueError(f"nothing was computed in mode '{mode}' between the snapshots")
    return tuple(zero / count for zero, count in zip(zeros, elements, strict=True))
