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

    The two paths add in different orders. In deterministic mode the choice may therefore depend on nothing but the row:
    tokens of a prompt run dense, since many of them together use nearly every neuron, and generated tokens sparse. A
    measurement would not do, because it may come out differently at the next start. Without that promise the choice
    follows measured costs, the number of rows and the zeros seen so far.

    Args:
        path: Path given by the operator, or auto.
        has_sparse: Whether there is a sparse kernel.
        costs: Measured costs to follow; None in deterministic mode.
    """

    def __init__(self, path: FfnPath, has_sparse: bool, costs: FfnCosts | None = None) -> None:
        self.path = path if has_sparse else FfnPath.DENSE
        self.costs = costs

    @property
    def prompts_may_be_sparse(self) -> bool:
        """Whether RELU tokens of a prompt are candidates for the sparse path at all."""
        return self.path is FfnPath.SPARSE

    def is_sparse(self, rows: int, zeros: float) -> bool:
        """Whether a step's candidates take the sparse path.

        Args:
            rows: How many there are.
            zeros: Share of zeros seen in RELU mode so far, in [0, 1].
        """
        if self.path is not FfnPath.AUTO or self.costs is None:
            return rows > 0 and self.path is not FfnPath.DENSE
        index = next((i for i, measured in enumerate(MEASURED_ROWS) if measured >= rows), len(MEASURED_ROWS) - 1)
        return rows > 0 and self.costs.sparse(index, zeros) < self.costs.dense[index]
