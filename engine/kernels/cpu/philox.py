"""Philox-4x32-10 for Numba kernels: the bits of `engine.philox`, fast enough for one draw per token of a vocabulary.

`philox4x32` is inlined into the kernels that draw as they compute; `uniform_rows` fills whole rows.
Numba's cache does not see changes in a function that a kernel of another file inlines: after an edit here, delete the
`__pycache__` folders.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from engine import philox

WORDS_PER_BLOCK = 4

# Numba promotes int64 with uint64 to float64, so every constant has its type from the start.
_MASK32 = np.uint64(philox.MASK32)
_SHIFT32 = np.uint64(32)
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(philox.MULTIPLIER_0), np.uint64(philox.MULTIPLIER_1)
_WEYL_0, _WEYL_1 = np.uint64(philox.WEYL_0), np.uint64(philox.WEYL_1)
_ROUNDS = philox.ROUNDS
_UNIFORM_SHIFT = np.uint32(9)
_HALF, _ULP = np.float32(0.5), np.float32(2.0**-23)


@njit(cache=True, nogil=True, forceinline=True)
def philox4x32(
    c0: int, c1: int, c2: int, c3: int, k0: int, k1: int
) -> tuple[np.uint32, np.uint32, np.uint32, np.uint32]:
    """Ten rounds of Philox-4x32 on one counter block; to be called from Numba code.

    A loop over `c0` vectorises: words travel as uint64, so a round is two 32 x 32 bit multiplications per lane.

    Args:
        c0: Index of the block, `index // 4`.
        c1: Decoder layer.
        c2: Position in the sequence.
        c3: Stream.
        k0: First key word.
        k1: Second key word. All six are integers of any type in [0, 2**32).

    Returns:
        Four uint32 words; word `i` belongs to index `4 * c0 + i`.
    """
    x0, x1, x2, x3 = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(c3)
    key_0, key_1 = np.uint64(k0), np.uint64(k1)
    for _ in range(_ROUNDS):
        product_0, product_1 = x0 * _MULTIPLIER_0, x2 * _MULTIPLIER_1
        x0, x1 = (product_1 >> _SHIFT32) ^ x1 ^ key_0, product_1 & _MASK32
        x2, x3 = (product_0 >> _SHIFT32) ^ x3 ^ key_1, product_0 & _MASK32
        key_0, key_1 = (key_0 + _WEYL_0) & _MASK32, (key_1 + _WEYL_1) & _MASK32
    return np.uint32(x0), np.uint32(x1), np.uint32(x2), np.uint32(x3)


@njit(cache=True, nogil=True, forceinline=True)
def uniform(word: np.uint32) -> np.float32:
    """float32 uniform in [2**-24, 1 - 2**-24] from one word, as `engine.philox.uniform`; for Numba code."""
    # Through int32: AVX2 has no conversion from unsigned integers.
    return (np.float32(np.int32(word >> _UNIFORM_SHIFT)) + _HALF) * _ULP


@njit(cache=True, nogil=True)
def uniform_rows(
    keys: NDArray[np.uint32], positions: NDArray[np.int64], layer: int, stream: int, out: NDArray[np.float32]
) -> None:
    """Fill rows with uniforms, bit-identical with `engine.philox.uniform(random_words(...))`.

    Rows are independent: what is in one does not depend on the others.

    Args:
        keys: uint32 [rows, 2], Philox key words.
        positions: int64 [rows], position in the sequence.
        layer: Decoder layer; 0 for token draws.
        stream: One of the `STREAM_` constants of `engine.philox`.
        out: float32 [rows, size], C-contiguous; overwritten with values in [2**-24, 1 - 2**-24].
    """
    rows, size = out.shape
    blocks = size // WORDS_PER_BLOCK
    for row in range(rows):
        k0, k1, position = keys[row, 0], keys[row, 1], positions[row]
        target = out[row]
        for block in range(blocks):
            w0, w1, w2, w3 = philox4x32(block, layer, position, stream, k0, k1)
            start = WORDS_PER_BLOCK * block
            target[start] = uniform(w0)
            target[start + 1] = uniform(w1)
            target[start + 2] = uniform(w2)
            target[start + 3] = uniform(w3)
        tail = philox4x32(blocks, layer, position, stream, k0, k1)
        for index in range(WORDS_PER_BLOCK * blocks, size):
            target[index] = uniform(tail[index % WORDS_PER_BLOCK])
