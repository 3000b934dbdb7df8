"""Philox-4x32-10 for Triton kernels: the bits of `engine.philox`, drawn where they are used.

The rounds are Triton's own (`tl.philox_impl`); what counts here is which counter belongs to which index. Nothing is
read from memory but keys and positions.
"""

import triton
import triton.language as tl


@triton.jit
def random_words(key_0, key_1, position, layer, first, STREAM: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words of consecutive neurons or token ids of some rows; to be called from kernels.

    Counter and word of index i are those of `engine.philox`: word i % 4 of counter (i // 4, layer, position, STREAM).

    Args:
        key_0: [ROWS], first key word of each row, any integer type in [0, 2**32).
        key_1: [ROWS], second key word.
        position: [ROWS], position in the sequence.
        layer: Decoder layer; 0 for token draws.
        first: First index, a multiple of 4.
        STREAM: One of the `STREAM_` constants of `engine.philox`.
        SIZE: Number of indices, a power of two of at least 4.

    Returns:
        uint32 [ROWS, SIZE]; word j of a row belongs to index first + j.
    """
    block = (tl.full((1,), first // 4, tl.int64) + tl.arange(0, SIZE // 4)).to(tl.uint32)[None, :]
    w0, w1, w2, w3 = tl.philox_impl(
        block,
        tl.full((1, 1), layer, tl.int64).to(tl.uint32),
        position.to(tl.uint32)[:, None],
        tl.full((1, 1), STREAM, tl.uint32),
        key_0.to(tl.uint32)[:, None],
        key_1.to(tl.uint32)[:, None],
    )
    pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [ROWS, SIZE / 4, 2, 2], in memory order w0, w1, w2, w3
    return tl.reshape(pairs, (position.shape[0], SIZE))


@triton.jit
def uniform(words):  # type: ignore[no-untyped-def]
    """float32 uniforms in [2**-24, 1 - 2**-24] from uint32 words, as `engine.philox.uniform`; for kernels.

    Every step is exact, so no compiler can round it otherwise.
    """
    return ((words >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
