"""Philox-4x32-10 in plain PyTorch: the reference for every random bit that the engine uses.

Counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11): a word is a pure function of a key
and a counter, so it does not matter who else is in the batch or whether a request is computed twice.

    key      two words derived from (seed, sample index), see `derive_key`
    counter  (index // 4, layer, position, stream); word `index % 4` of the result belongs to `index`

`stream` keeps the uses apart: activation draws index by neuron, token draws by token id (layer 0).
"""

from typing import TypeVar

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

STREAM_ACTIVATION = 0
STREAM_SAMPLING = 1
STREAM_KEY = 2


Word = TypeVar("Word", int, Tensor)


def _ten_rounds(c0: Word, c1: Word, c2: Word, c3: Word, k0: Word, k1: Word) -> tuple[Word, Word, Word, Word]:
    for _ in range(ROUNDS):
        # 32 x 32 bit products wrap around in int64; the masks make both halves right all the same.
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        high_0, low_0 = (product_0 >> 32) & MASK32, product_0 & MASK32
        high_1, low_1 = (product_1 >> 32) & MASK32, product_1 & MASK32
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + WEYL_0) & MASK32, (k1 + WEYL_1) & MASK32
    return c0, c1, c2, c3


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Ten rounds of Philox-4x32.

    Args:
        counter: Four broadcastable int64 tensors holding 32-bit words.
        key: Two more of the same kind.

    Returns:
        int64 tensor of the broadcast shape plus a last axis of 4: the words, each in [0, 2**32).
    """
    words = torch.broadcast_tensors(*counter, *key)  # type: ignore[no-untyped-call]
    return torch.stack(_ten_rounds(*words), dim=-1)


def random_words(keys: Tensor, positions: Tensor, layer: int, size: int, stream: int) -> Tensor:
    """Words for `size` neurons or token ids of every row.

    Args:
        keys: int64 [rows, 2], 32-bit words.
        positions: int64 [rows], position in the sequence.
        layer: Decoder layer; 0 for token draws.
        size: Number of neurons or tokens.
        stream: One of the `STREAM_` constants.

    Returns:
        int64 [rows, size] with values in [0, 2**32).
    """
    index = torch.arange((size + 3) // 4, dtype=torch.int64, device=keys.device)
    constants = torch.tensor([layer, stream], device=keys.device)
    counter = (index[None, :], constants[0], positions[:, None], constants[1])
    words = philox4x32(counter, (keys[:, 0:1], keys[:, 1:2]))
    return words.flatten(1)[:, :size]


def derive_key(seed: int, sample_index: int) -> tuple[int, int]:
    """Key of sample `sample_index` of a request with this 64-bit seed (negative seeds wrap around)."""
    seed &= 2**64 - 1
    word_0, word_1, _, _ = _ten_rounds(sample_index, 0, 0, STREAM_KEY, seed & MASK32, seed >> 32)
    return word_0, word_1


def uniform(words: Tensor) -> Tensor:
    """float32 uniforms in [2**-24, 1 - 2**-24]: never 0 or 1, which would give infinite Gumbel noise."""
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23
