"""Sums of what the rows of a step counted: one compiled call each, where NumPy would need several."""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

IntArray = NDArray[np.integer[Any]]


@njit(cache=True, nogil=True)
def count_zeros(modes: IntArray, zeros: IntArray, intermediate: int, all_zeros: IntArray, elements: IntArray) -> None:
    """Add the zeros of rows to those of their modes.

    Args:
        modes: [rows], index into `engine.activation.MODES`.
        zeros: [layers, rows], zeros of each row in each layer.
        intermediate: Elements of a row in one layer.
        all_zeros: int64 [modes, layers], added to.
        elements: int64 [modes, layers], added to.
    """
    for row in range(modes.size):
        mode = modes[row]
        for layer in range(zeros.shape[0]):
            all_zeros[mode, layer] += zeros[layer, row]
            elements[mode, layer] += intermediate


@njit(cache=True, nogil=True)
def count_draws(
    modes: IntArray, stochastic: int, thresholds: IntArray, zeros: IntArray, kept: IntArray
) -> tuple[int, int, float]:
    """Negative values of the rows of one mode, those that were kept, and the sum of what rows expect to keep.

    Args:
        modes: [rows].
        stochastic: The mode that counts.
        thresholds: [rows], of 2**32: the share that a row expects to keep.
        zeros: [layers, rows], negative values that were not kept.
        kept: [layers, rows], those that were.
    """
    negatives, passed, expected = 0, 0, 0.0
    for row in range(modes.size):
        if modes[row] == stochastic:
            own = kept[:, row].sum()
            both = own + zeros[:, row].sum()
            passed += own
            negatives += both
            expected += both * (thresholds[row] / 2.0**32)
    return negatives, passed, expected
