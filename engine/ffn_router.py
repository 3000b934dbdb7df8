"""Chooses the feed-forward path of a step from measured costs."""

from collections.abc import Callable
from dataclasses import dataclass

from engine.config import FfnPath

MEASURED_ROWS = (1, 2, 4, 8, 16, 32, 64)
LOW_ZEROS, HIGH_ZEROS = 0.5, 0.9  # shares of zeros at which the sparse path is measured
# The share of the dense path's time below which the sparse one is taken: where both are close, noise would decide.
WORTHWHILE = 0.92


@dataclass(frozen=True, slots=True)
class FfnCosts:
    """Seconds of one layer's feed-forward on this machine, one entry for each of `MEASURED_ROWS`."""

    dense: tuple[float, ...]
    sparse_low: tuple[float, ...]  # at LOW_ZEROS
    sparse_high: tuple[float, ...]  # at HIGH_ZEROS

    def sparse(self, index: int, zeros: float) -> float:
        """Sparse cost at a share of zeros from LOW_ZEROS on: linear in the share of active neurons."""
        low, high = self.sparse_low[index], self.sparse_high[index]
        return max(0.0, low + (high - low) * (zeros - LOW_ZEROS) / (HIGH_ZEROS - LOW_ZEROS))


class FfnRouter:
    """Decides whether a step's feed-forward skips zeros. Both ways give the same bits, so it may follow the load.

    Args:
        path: Path given by the operator, or auto.
        measure: Times both paths; gives None where there is no sparse one. Called for auto only.
    """

    def __init__(self, path: FfnPath, measure: Callable[[], FfnCosts | None]) -> None:
        self.path = path
        self.costs = measure() if path is FfnPath.AUTO else None

    def skips(self, relu: int, rows: int, zeros: float) -> bool:
        """Whether zeros are skipped.

        Args:
            relu: Rows in RELU mode. Others have no zeros to speak of, so with them every weight is read anyway.
            rows: Rows in all.
            zeros: Share of zeros seen in RELU mode so far, in [0, 1].
        """
        if self.path is FfnPath.SPARSE:
            return relu > 0
        if self.costs is None or relu < rows or relu == 0:
            return False
        if zeros < LOW_ZEROS:  # RELU leaves more than half; what costs are below that is a guess
            return False
        index = next((i for i, measured in enumerate(MEASURED_ROWS) if measured >= rows), len(MEASURED_ROWS) - 1)
        return self.costs.sparse(index, zeros) < WORTHWHILE * self.costs.dense[index]
