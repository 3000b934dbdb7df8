"""Philox in PyTorch has the words of Random123, and keys and streams keep their users apart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.philox import (
    STREAM_ACTIVATION,
    STREAM_KEY,
    STREAM_SAMPLING,
    derive_key,
    philox4x32,
    random_words,
    uniform,
)
from engine.sampling_params import SEED_MAX, SEED_MIN
from tests.engine.draws import PUBLISHED_VECTORS

WORD = st.integers(0, 2**32 - 1)
SEED = st.integers(SEED_MIN, SEED_MAX)
STREAMS = (STREAM_ACTIVATION, STREAM_SAMPLING, STREAM_KEY)


def philox_in_integers(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """The published algorithm in Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * c0, 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    c0, c1, c2, c3, k0, k1 = (torch.tensor(word) for word in (*counter, *key))
    words: list[int] = philox4x32((c0, c1, c2, c3), (k0, k1)).tolist()
    return words


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED_VECTORS)
def test_published_vectors(counter: str, key: str, words: str) -> None:
    def parse(text: str) -> tuple[int, ...]:
        return tuple(int(word, 16) for word in text.split())

    assert philox(parse(counter), parse(key)) == list(parse(words))


@settings(deadline=None)
@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_words_equal_those_of_unbounded_integers(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    assert philox(counter, key) == philox_in_integers(counter, key)


@settings(deadline=None)
@given(
    keys=st.lists(st.tuples(WORD, WORD), min_size=1, max_size=3),
    position=st.integers(0, 2**31),
    layer=st.integers(0, 200),
    size=st.integers(1, 23),
    stream=st.sampled_from(STREAMS),
)
def test_word_of_an_index_is_a_function_of_key_position_layer_and_stream(
    keys: list[tuple[int, int]], position: int, layer: int, size: int, stream: int
) -> None:
    positions = [position + row for row in range(len(keys))]

    words = random_words(torch.tensor(keys), torch.tensor(positions), layer, size, stream)

    assert words.tolist() == [
        [philox_in_integers((index // 4, layer, at, stream), key)[index % 4] for index in range(size)]
        for key, at in zip(keys, positions, strict=True)
    ]


def test_no_rows_and_no_neurons() -> None:
    assert random_words(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.int64), 0, 5, 0).shape == (
        0,
        5,
    )
    assert random_words(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 0, 0, 0).shape == (
        3,
        0,
    )


def test_keys_of_samples_and_seeds_are_all_different() -> None:
    seeds = [*range(-8, 8), 2**32 - 1, 2**32, 2**53, SEED_MAX, SEED_MIN]
    keys = [derive_key(seed, sample) for seed in seeds for sample in range(32)]

    assert len(set(keys)) == len(keys)
    assert len({first for first, _ in keys}) > 0.99 * len(keys)
    assert all(0 <= word < 2**32 for key in keys for word in key)


@settings(deadline=None)
@given(seed=SEED, sample=st.integers(0, 127))
def test_a_key_is_a_pure_function_and_negative_seeds_wrap_around(seed: int, sample: int) -> None:
    assert derive_key(seed, sample) == derive_key(seed, sample)
    assert derive_key(seed, sample) == derive_key(seed % 2**64, sample)
    assert derive_key(seed, sample) != derive_key(~seed, sample)


def test_both_halves_of_a_seed_count() -> None:
    assert len({derive_key(seed, 0) for seed in (0, 1, 2**31, 2**32, 2**62, -1)}) == 6


def test_streams_are_separate() -> None:
    """4 standard errors of the correlation of n independent pairs are 4 / sqrt(n)."""
    keys, positions = torch.tensor([derive_key(5, 0)] * 16), torch.arange(16)
    words = [random_words(keys, positions, 0, 4096, stream).flatten().double() for stream in STREAMS]

    correlations = torch.corrcoef(torch.stack(words)) - torch.eye(3)

    assert correlations.abs().max() < 4 / words[0].numel() ** 0.5


def test_uniforms_are_in_the_open_interval_and_spread_evenly() -> None:
    extremes = uniform(torch.tensor([0, 2**31, 2**32 - 1]))
    drawn = uniform(random_words(torch.tensor([derive_key(1, 0)]), torch.tensor([0]), 0, 2**18, STREAM_SAMPLING))
    counts = torch.histc(drawn, 64, 0, 1)
    expected = drawn.numel() / 64

    assert extremes.dtype is torch.float32
    assert extremes.tolist() == [2.0**-24, 0.5 + 2.0**-24, 1 - 2.0**-24]
    # Chi-squared with 63 degrees of freedom has mean 63 and variance 126.
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 63) < 4 * 126**0.5


def test_words_are_made_where_the_keys_are() -> None:
    keys, positions = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    words = random_words(keys.to("meta"), positions.to("meta"), 2, 9, STREAM_ACTIVATION)
    assert words.is_meta
    assert words.shape == (3, 9)
