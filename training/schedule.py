"""Which activation each sequence of each step runs with, and how fast it learns. Pure functions of the step."""

import math
import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from training.errors import InvalidTuneConfig

SHARES = ("relu", "silu", "uniform")
ALLOWED = "a number in [0, 1], 'START:END', or shares such as 'relu=0.5,silu=0.25,uniform=0.25'"


class PSchedule(Protocol):
    """Distribution of p, the probability of SILU for a negative gate value."""

    def draw(self, progress: float, batch_size: int, rng: np.random.Generator) -> NDArray[np.float32]:
        """p of each sequence of a batch, `progress` in [0, 1] of the run being done."""
        ...


@dataclass(frozen=True, slots=True)
class Constant:
    """The same p throughout, as in the paper."""

    p: float

    def draw(self, progress: float, batch_size: int, rng: np.random.Generator) -> NDArray[np.float32]:
        """See `PSchedule`."""
        return np.full(batch_size, self.p, np.float32)


@dataclass(frozen=True, slots=True)
class Linear:
    """From one p to another over the run."""

    start: float
    end: float

    def draw(self, progress: float, batch_size: int, rng: np.random.Generator) -> NDArray[np.float32]:
        """See `PSchedule`."""
        return np.full(batch_size, self.start + (self.end - self.start) * progress, np.float32)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of the sequences run in RELU, in SILU and with a p that is uniform in [0, 1].

    So one checkpoint becomes good in all modes at once. Counts of a batch follow the shares as closely as they can.
    """

    relu: float
    silu: float
    uniform: float

    def draw(self, progress: float, batch_size: int, rng: np.random.Generator) -> NDArray[np.float32]:
        """See `PSchedule`."""
        # Systematic sampling: each share's count is its expectation, rounded up or down.
        points = (np.arange(batch_size) + rng.random()) / batch_size
        p = rng.random(batch_size, np.float32)
        p[points < self.relu + self.silu] = 1.0
        p[points < self.relu] = 0.0
        return rng.permutation(p)


def parse_p(text: str) -> PSchedule:
    """Read the value of `--p`: "0.7", "1.0:0.3" or "relu=0.5,silu=0.25,uniform=0.25".

    Raises:
        InvalidTuneConfig: It is none of these, or out of range.
    """
    number = r"\d*\.?\d+(?:[eE]-?\d+)?"
    if re.fullmatch(number, text):
        return Constant(_probability(text))
    if match := re.fullmatch(rf"({number}):({number})", text):
        return Linear(_probability(match[1]), _probability(match[2]))
    shares: dict[str, float] = {}
    for item in text.split(","):
        match = re.fullmatch(rf"({'|'.join(SHARES)})=({number})", item.strip())
        if not match or match[1] in shares:
            raise InvalidTuneConfig(f"p must be {ALLOWED}, got {text!r}", "p")
        shares[match[1]] = _probability(match[2])
    if not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise InvalidTuneConfig(f"the shares of p must add up to 1, got {text!r}", "p")
    return Mixture(**{name: shares.get(name, 0.0) for name in SHARES})


def _probability(text: str) -> float:
    value = float(text)
    if value > 1:
        raise InvalidTuneConfig(f"p must be {ALLOWED}, got {text!r}", "p")
    return value


def learning_rate_share(step: int, steps: int, warmup_steps: int, floor: float) -> float:
    """Learning rate of a step as a share of its peak: linear warm-up, then a cosine down to `floor`."""
    warmup = min(1.0, (step + 1) / max(warmup_steps, 1))
    return warmup * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))
