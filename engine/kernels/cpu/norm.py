"""RMSNorm, one row at a time."""

import numpy as np
from numba import njit, prange

from engine.kernels.cpu.math import narrow, widen
from engine.kernels.cpu.options import OPTIONS
from engine.kernels.cpu.simd import dot


@njit(parallel=True, **OPTIONS)
def rms_norm(x, weight, eps, out):  # type: ignore[no-untyped-def]
    """out[r] = x[r] / sqrt(mean(x[r]**2) + eps) * weight, in float32 and rounded once.

    Args:
        x: float32 [rows, hidden], hidden a multiple of 16.
        weight: [hidden], float32 or bfloat16 bits.
        eps: float32.
        out: [rows, hidden], like `weight`.
    """
    rows, hidden = x.shape
    flat = x.reshape(-1)
    for row in prange(rows):
        mean = dot(flat, row * hidden, flat, row * hidden, hidden) / np.float32(hidden)
        scale = np.float32(1) / np.sqrt(mean + eps)
        for k in range(hidden):
            out[row, k] = narrow(x[row, k] * scale * widen(weight[k]), out)
