"""Counts of feed-forward zeros by activation mode and layer."""

import numpy as np
from numpy.typing import NDArray

from engine.activation import MODE_CODE, MODES, ActivationMode
from engine.kernels.cpu.counting import count_zeros


class SparsityCounters:
    """Cumulative zeros and elements of act(gate).

    Written by the engine thread only. Readers copy: a torn read is off by one step at most.
    """

    def __init__(self, num_layers: int) -> None:
        self.zeros = np.zeros((len(MODES), num_layers), np.int64)
        self.elements = np.zeros((len(MODES), num_layers), np.int64)

    def reset(self) -> None:
        """Forget all counts."""
        self.zeros[:] = self.elements[:] = 0

    def add(self, modes: NDArray[np.int64], zeros: NDArray[np.int64], intermediate: int) -> None:
        """Count a step.

        Args:
            modes: [rows], index into `MODES`.
            zeros: [layers, rows], zeros of each row in each layer.
            intermediate: Elements of a row in one layer.
        """
        count_zeros(modes, zeros, intermediate, self.zeros, self.elements)

    def share(self, mode: ActivationMode) -> tuple[int, int]:
        """Zeros and elements of one mode over all layers."""
        code = MODE_CODE[mode]
        return int(self.zeros[code].sum()), int(self.elements[code].sum())

    def by_mode(self) -> tuple[dict[ActivationMode, list[int]], dict[ActivationMode, list[int]]]:
        """Zeros and elements, each a list over layers by mode."""
        zeros = {mode: self.zeros[code].tolist() for code, mode in enumerate(MODES)}
        elements = {mode: self.elements[code].tolist() for code, mode in enumerate(MODES)}
        return zeros, elements
