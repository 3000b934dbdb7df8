"""Looked up angles are those that are computed, wherever the table ends."""

import numpy as np
import torch

from engine.kernels.backend import rotary_angles
from engine.kernels.cpu.angles import FIRST_POSITIONS, AngleTable
from engine.models.rope import inverse_frequencies


def test_angles_are_those_of_the_positions() -> None:
    inv_freq = inverse_frequencies(16, 10_000.0)
    table = AngleTable(inv_freq)
    for positions in ([0], [5, 3, 3], [FIRST_POSITIONS - 1, FIRST_POSITIONS], [5 * FIRST_POSITIONS], []):
        cos, sin = table.at(np.array(positions, np.int64))

        expected = rotary_angles(torch.tensor(positions, dtype=torch.int64), inv_freq)
        assert np.array_equal(cos, expected[0].numpy())
        assert np.array_equal(sin, expected[1].numpy())
        assert cos.flags.c_contiguous
        assert cos.dtype == np.float32
