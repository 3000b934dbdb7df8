"""The activation of a feed-forward layer for a batch whose rows are in any mode, fused with the product by `up`."""

import numpy as np
from numba import njit, prange

from engine.kernels.cpu.math import narrow, silu, widen
from engine.kernels.cpu.options import OPTIONS
from engine.kernels.cpu.philox import philox4x32
from engine.philox import STREAM_ACTIVATION

_NEVER, _ALWAYS = np.int64(0), np.int64(2**32)
_ZERO = np.float32(0)


@njit(**OPTIONS)
def _activate_silu(gate, out):  # type: ignore[no-untyped-def]
    for j in range(out.size):
        out[j] = silu(widen(gate[j]))


@njit(**OPTIONS)
def _activate_relu(gate, identity, out):  # type: ignore[no-untyped-def]
    if identity:
        for j in range(out.size):
            out[j] = max(widen(gate[j]), _ZERO)
    else:
        for j in range(out.size):
            out[j] = silu(max(widen(gate[j]), _ZERO))


@njit(**OPTIONS)
def _activate_stochastic(gate, threshold, key_0, key_1, position, layer, identity, words, out):  # type: ignore[no-untyped-def]
    for block in range(words.shape[0]):
        w0, w1, w2, w3 = philox4x32(block, layer, position, STREAM_ACTIVATION, key_0, key_1)
        words[block, 0], words[block, 1], words[block, 2], words[block, 3] = w0, w1, w2, w3
    flat = words.reshape(-1)
    for j in range(out.size):
        x = widen(gate[j])
        value = silu(x)
        negative = value if np.int64(flat[j]) < threshold else _ZERO
        positive = x if identity else value
        out[j] = negative if x < _ZERO else positive


@njit(**OPTIONS)
def _count_zeros(values):  # type: ignore[no-untyped-def]
    zeros = 0
    for j in range(values.size):
        zeros += values[j] == _ZERO
    return zeros


@njit(parallel=True, **OPTIONS)
def activate(gate, thresholds, keys, positions, is_silu, layer, identity, up, out, zeros):  # type: ignore[no-untyped-def]
    """out = act(gate) * up for every row, in the row's own mode; masks are the reference's bit for bit.

    Args:
        gate: [rows, intermediate], float32 or bfloat16 bits.
        thresholds: int64 [rows], see `Activation.threshold`.
        keys: int64 [rows, 2], Philox key words.
        positions: int64 [rows].
        is_silu: bool [rows], rows in SILU mode (the positive branch does not apply to them).
        layer: Decoder layer.
        identity: The checkpoint's positive branch: True for x, False for SILU(x).
        up: [rows, intermediate] like `gate`, or [rows, 0] to leave out the product.
        out: [rows, intermediate], float32 or bfloat16 bits.
        zeros: Out, int64 [rows], how many activations are exactly 0.
    """
    rows, intermediate = gate.shape
    for row in prange(rows):
        activated = np.empty(intermediate, np.float32)
        threshold = thresholds[row]
        plain = is_silu[row] or not identity
        if threshold == _ALWAYS and plain:
            _activate_silu(gate[row], activated)
        elif threshold == _NEVER:
            _activate_relu(gate[row], identity, activated)
        else:
            words = np.empty(((intermediate + 3) // 4, 4), np.uint32)
            key_0, key_1 = keys[row, 0], keys[row, 1]
            _activate_stochastic(gate[row], threshold, key_0, key_1, positions[row], layer, identity, words, activated)
        zeros[row] = _count_zeros(activated)
        if up.shape[1] == 0:
            for j in range(intermediate):
                out[row, j] = narrow(activated[j], out)
        else:
            for j in range(intermediate):
                out[row, j] = narrow(activated[j] * widen(up[row, j]), out)
