"""Counts of feed-forward zeros by activation mode and layer."""

import numpy as np
from numpy.typing import NDArray

from engine.activation import MODE_CODE, MODES, ActivationMode


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

    def add(self, layer: int, modes: NDArray[np.int64], zeros: NDArray[np.int64], intermediate: int) -> None:
        """Count one layer of a step.

        Args:
            layer: Decoder layer.
            modes: [rows], index into `MODES`.
            zeros: [rows], zeros of each row.
            intermediate: Elements of a row.
        """
        self.zeros[:, layer] += np.bincount(modes, zeros, len(MODES)).astype(np.int64)
        self.elements[:, layer] += np.bincount(modes, minlength=len(MODES)) * intermediate

    def share(self, mode: ActivationMode) -> tuple[int, int]:
        """Zeros and elements of one mode over all layers."""
        code = MODE_CODE[mode]
        return int(self.zeros[code].sum()), int(self.elements[code].sum())

    def by_mode(self) -> tuple[dict[ActivationMode, list[int]], dict[ActivationMode, list[int]]]:
        """Zeros and elements, each a list over layers by mode."""
        zeros = {mode: self.zeros[code].tolist() for code, mode in enumerate(MODES)}
        elements = {mode: self.elements[code].tolist() for code, mode in enumerate(MODES)}
        return zeros, elements
