"""Counts of what stochastic rows drew, against what they asked for."""

import numpy as np
from numpy.typing import NDArray

from engine.activation import MODE_CODE, ActivationMode
from engine.kernels.cpu.counting import count_draws

_STOCHASTIC = MODE_CODE[ActivationMode.STOCHASTIC]


class DrawCounters:
    """Negative gate values of stochastic rows, and how many of them went through SILU.

    `kept / negatives` is the probability that was drawn; `expected / negatives` the one that was asked for, each row's
    p weighted by its negative values. A gate value that is exactly 0, or below about -100, where SILU rounds to 0,
    cannot be told from one that was drawn to be 0 and counts as such; both are rare.

    Written by the engine thread only. Readers copy: a torn read is off by one step at most.
    """

    def __init__(self) -> None:
        self.negatives = 0
        self.kept = 0
        self.expected = 0.0

    def reset(self) -> None:
        """Forget all counts."""
        self.negatives = self.kept = 0
        self.expected = 0.0

    def add(
        self,
        modes: NDArray[np.int64],
        thresholds: NDArray[np.int64],
        zeros: NDArray[np.int64],
        kept: NDArray[np.int64],
    ) -> None:
        """Count a step.

        Args:
            modes: [rows], index into `MODES`. Rows of other modes do not count.
            thresholds: [rows], see `Activation.threshold`.
            zeros: [layers, rows], values of act(gate) that are 0.
            kept: [layers, rows], values that are negative.
        """
        negatives, passed, expected = count_draws(modes, _STOCHASTIC, thresholds, zeros, kept)
        self.negatives += negatives
        self.kept += passed
        self.expected += expected
