"""The activation of 32 gate values of one row, in the row's own mode."""

import numpy as np
from numba import njit

from engine.kernels.cpu.math import silu
from engine.kernels.cpu.options import INNER, OPTIONS
from engine.kernels.cpu.philox import WORDS_PER_BLOCK, philox4x32
from engine.philox import STREAM_ACTIVATION

_NEVER, _ALWAYS = np.int64(0), np.int64(2**32)
_ZERO = np.float32(0)


@njit(**INNER)
def _relu(values, identity):  # type: ignore[no-untyped-def]
    if identity:
        for j in range(values.size):
            values[j] = max(values[j], _ZERO)
    else:
        for j in range(values.size):
            values[j] = silu(max(values[j], _ZERO))


@njit(**INNER)
def _stochastic(values, first, threshold, key_0, key_1, position, layer, identity, words):  # type: ignore[no-untyped-def]
    for block in range(values.size // WORDS_PER_BLOCK):
        at = first // WORDS_PER_BLOCK + block
        w0, w1, w2, w3 = philox4x32(at, layer, position, STREAM_ACTIVATION, key_0, key_1)
        words[4 * block], words[4 * block + 1], words[4 * block + 2], words[4 * block + 3] = w0, w1, w2, w3
    for j in range(values.size):
        x = values[j]
        value = silu(x)
        negative = value if np.int64(words[j]) < threshold else _ZERO
        positive = x if identity else value
        values[j] = negative if x < _ZERO else positive


@njit(**OPTIONS)
def activate(values, first, threshold, key_0, key_1, position, is_silu, layer, identity, words):  # type: ignore[no-untyped-def]
    """values = act(values); masks are the reference's bit for bit.

    Args:
        values: float32 [n], the row's gate values of neurons from `first` on; n and first are multiples of 4.
        first: First neuron.
        threshold: See `Activation.threshold`.
        key_0, key_1: Philox key words.
        position: Of the row's token in its sequence.
        is_silu: The row is in SILU mode (the positive branch does not apply to it).
        layer: Decoder layer.
        identity: The checkpoint's positive branch: True for x, False for SILU(x).
        words: Scratch, uint32 [n].

    Returns:
        How many values are exactly 0; and how many are negative, which SILU kept, of a stochastic row (else 0).
    """
    if threshold == _ALWAYS and (is_silu or not identity):
        for j in range(values.size):
            values[j] = silu(values[j])
    elif threshold == _NEVER:
        _relu(values, identity)
    else:
        _stochastic(values, first, threshold, key_0, key_1, position, layer, identity, words)
    zeros = 0
    for j in range(values.size):
        zeros += values[j] == _ZERO
    kept = 0
    if not is_silu and threshold != _NEVER:
        for j in range(values.size):
            kept += values[j] < _ZERO
    return zeros, kept
