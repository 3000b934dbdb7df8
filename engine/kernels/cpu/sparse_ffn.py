"""The sparse half of a gated feed-forward: `up` and `down` rows are read for active neurons only."""

import numpy as np
from numba import njit, prange

from engine.kernels.cpu.math import narrow
from engine.kernels.cpu.options import OPTIONS
from engine.kernels.cpu.simd import add_scaled, dot

# Neurons are cut into this many parts whatever the number of threads, so that sums do not depend on it.
PARTS = 16


@njit(parallel=True, **OPTIONS)
def sparse_ffn(x, activated, up, down, partial, out):  # type: ignore[no-untyped-def]
    """out[r] = sum over neurons j with activated[r, j] != 0 of activated[r, j] * dot(x[r], up[j]) * down[j].

    A neuron's weights are read once for all rows in which it is active: with sparsity s, one row reads
    2 * (1 - s) * intermediate * hidden weights. Sums run over j in order inside each of 16 fixed parts, then over the
    parts in order: skipping a zero changes nothing, so a row's result does not depend on the others.

    Args:
        x: float32 [rows, hidden], hidden a multiple of 16.
        activated: float32 [rows, intermediate], act(gate).
        up, down: [intermediate, hidden] neuron-major, float32 or bfloat16 bits.
        partial: Scratch, float32 [16, rows, hidden].
        out: float32 or bfloat16 bits [rows, hidden].
    """
    rows, hidden = x.shape
    intermediate = up.shape[0]
    flat_x, flat_up, flat_down, flat_partial = x.reshape(-1), up.reshape(-1), down.reshape(-1), partial.reshape(-1)
    for part in prange(PARTS):
        partial[part] = 0
        for j in range(intermediate * part // PARTS, intermediate * (part + 1) // PARTS):
            for row in range(rows):
                gate = activated[row, j]
                if gate != 0:
                    factor = gate * dot(flat_x, row * hidden, flat_up, j * hidden, hidden)
                    add_scaled(flat_partial, (part * rows + row) * hidden, factor, flat_down, j * hidden, hidden)
    for row in prange(rows):
        total = np.zeros(hidden, np.float32)
        for part in range(PARTS):
            for k in range(hidden):
                total[k] += partial[part, row, k]
        for k in range(hidden):
            out[row, k] = narrow(total[k], out)
