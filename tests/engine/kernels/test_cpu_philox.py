"""The Numba Philox has the bits of Random123 and of the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import philox as reference
from engine.kernels.cpu.philox import philox4x32, uniform_rows
from tests.engine.draws import PUBLISHED_VECTORS

WORD = st.integers(0, 2**32 - 1)


def rows_of(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(count)
    return random.integers(0, 2**32, (count, 2), dtype=np.uint32), random.integers(0, 2**31, count)


def expected(keys: np.ndarray, positions: np.ndarray, layer: int, size: int, stream: int) -> np.ndarray:
    words = reference.random_words(
        torch.from_numpy(keys.astype(np.int64)), torch.from_numpy(positions), layer, size, stream
    )
    return reference.uniform(words).numpy()


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED_VECTORS)
def test_published_vectors(counter: str, key: str, words: str) -> None:
    inputs = [int(word, 16) for word in f"{counter} {key}".split()]

    assert list(philox4x32(*inputs)) == [int(word, 16) for word in words.split()]


@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_words_equal_the_reference(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    tensors = [torch.tensor(word) for word in (*counter, *key)]

    words = philox4x32(*counter, *key)

    assert list(words) == reference.philox4x32(tuple(tensors[:4]), tuple(tensors[4:])).tolist()


@settings(deadline=None)
@given(count=st.integers(1, 5), size=st.integers(0, 70), layer=st.integers(0, 200), stream=st.integers(0, 2))
def test_uniforms_equal_the_reference(count: int, size: int, layer: int, stream: int) -> None:
    keys, positions = rows_of(count)
    out = np.full((count, size), np.nan, np.float32)

    uniform_rows(keys, positions, layer, stream, out)

    np.testing.assert_array_equal(out, expected(keys, positions, layer, size, stream))


def test_uniforms_of_a_whole_vocabulary_are_inside_the_open_interval() -> None:
    keys, positions = rows_of(3)
    out = np.empty((3, 49152), np.float32)

    uniform_rows(keys, positions, 0, reference.STREAM_SAMPLING, out)

    np.testing.assert_array_equal(out, expected(keys, positions, 0, 49152, reference.STREAM_SAMPLING))
    assert out.min() >= 2.0**-24
    assert out.max() <= 1 - 2.0**-24
