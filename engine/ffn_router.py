"""Chooses the feed-forward path of RELU rows from measured costs."""

from dataclasses import dataclass

from engine.config import FfnPath

MEASURED_ROWS = (1, 2, 4, 8, 16, 32, 64)
LOW_ZEROS, HIGH_ZEROS = 0.5, 0.9  # shares of zeros at which the sparse path is measured


@dataclass(frozen=True, slots=True)
class FfnCosts:
    """Seconds of one layer's `up` and `down` on this machine, one entry for each of `MEASURED_ROWS`."""

    dense: tuple[float, ...]
    sparse_low: tuple[float, ...]  # at LOW_ZEROS
    sparse_high: tuple[float, ...]  # at HIGH_ZEROS

    def sparse(self, index: int, zeros: float) -> float:
        """Sparse cost at a share of zeros: linear in the share of active neurons."""
        low, high = self.sparse_low[index], self.sparse_high[index]
        return max(0.0, low + (high - low) * (zeros - LOW_ZEROS) / (HIGH_ZEROS - LOW_ZEROS))


class FfnRouter:
    """Decides how many of a step's RELU rows skip their zeros.

    The two paths add in different orders. In deterministic mode the choice may therefore depend on the row alone:
    tokens of the prompt run dense, generated tokens take whichever path is faster for one row at 50 % zeros. Otherwise
    it follows the load.

    Args:
        path: Path given by the operator, or auto.
        deterministic: See `EngineConfig.deterministic`.
        costs: Measured; None where there is no sparse kernel.
    """

    def __init__(self, path: FfnPath, deterministic: bool, costs: FfnCosts | None) -> None:
        self.path = path
        self.deterministic = deterministic
        self.costs = costs

    def prompt_is_sparse(self) -> bool:
        """Whether RELU tokens of a prompt may take the sparse path at all."""
        return self.costs is not None and self.path is FfnPath.SPARSE

    def is_sparse(self, rows: int, zeros: float) -> bool:
        """Whether a step's generated RELU tokens take the sparse path.

        Args:
            rows: How many there are.
            zeros: Share of zeros seen in RELU mode so far, in [0, 1].
        """
        if self.costs is None or self.path is FfnPath.DENSE or rows == 0:
            return False
        if self.path is FfnPath.SPARSE:
            return True
        if self.deterministic:
            return self.costs.sparse(0, LOW_ZEROS) < self.costs.dense[0]
        index = next((i for i, measured in enumerate(MEASURED_ROWS) if measured >= rows), len(MEASURED_ROWS) - 1)
        return self.costs.sparse(index, zeros) < self.costs.dense[index]
