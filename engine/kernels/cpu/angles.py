"""Rotary angles of positions, each computed once."""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.backend import rotary_angles

FIRST_POSITIONS: Final = 2048  # that the table has at first; it doubles when a later one comes


class AngleTable:
    """Cosine and sine of the rotary angles of all positions that have come, or are near to one that has.

    A step has few rows, and its caches are full of weights: to look two lines up takes a third of the time that it
    takes to compute them.

    Args:
        inv_freq: float32 [head_dim / 2].
    """

    def __init__(self, inv_freq: Tensor) -> None:
        self._inv_freq = inv_freq
        self._grow(FIRST_POSITIONS)

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosine and sine, float32 [rows, head_dim / 2], of positions [rows], each at least 0."""
        while True:
            try:
                return self._cos[positions], self._sin[positions]
            except IndexError:
                self._grow(2 * len(self._cos))

    def _grow(self, positions: int) -> None:
        cos, sin = rotary_angles(torch.arange(positions), self._inv_freq)
        self._cos, self._sin = cos.numpy(), sin.numpy()
