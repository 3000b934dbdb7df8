"""How close samples stay to a reference, the model's greedy answer with SILU."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from statistics import fmean
from typing import Any


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of the samples of a prompt with its reference, or the mean over prompts.

    Attributes:
        equal: Share of samples that are the reference.
        common_prefix: Tokens of the longest common beginning, mean over samples.
        token_agreement: Share of places at which both have the same token, of the places of the longer one; mean over
            samples.
        reference_tokens: Length of the reference, the most that `common_prefix` can be.
    """

    equal: float
    common_prefix: float
    token_agreement: float
    reference_tokens: float

    def to_json(self) -> dict[str, Any]:
        """Fields by name."""
        return asdict(self)


def measure_agreement(samples: Sequence[Sequence[int]], reference: Sequence[int]) -> Agreement:
    """Agreement of samples of one prompt with the reference.

    Args:
        samples: Token ids of each sample, at least one sample.
        reference: Token ids of the reference.
    """
    expected = list(reference)
    return Agreement(
        equal=fmean(list(sample) == expected for sample in samples),
        common_prefix=fmean(common_prefix(sample, reference) for sample in samples),
        token_agreement=fmean(token_agreement(sample, reference) for sample in samples),
        reference_tokens=float(len(reference)),
    )


def mean_agreement(measured: Sequence[Agreement]) -> Agreement:
    """Mean over prompts, field by field."""
    return Agreement(
        equal=fmean(item.equal for item in measured),
        common_prefix=fmean(item.common_prefix for item in measured),
        token_agreement=fmean(item.token_agreement for item in measured),
        reference_tokens=fmean(item.reference_tokens for item in measured),
    )


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens at the beginning that are the same in both."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def token_agreement(first: Sequence[int], second: Sequence[int]) -> float:
    """Share of places with the same token, of the places of the longer one; 1 if both are empty."""
    longest = max(len(first), len(second))
    if not longest:
        return 1.0
    return sum(a == b for a, b in zip(first, second, strict=False)) / longest
