"""The Triton Philox has the bits of Random123 and of the reference."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine import philox as reference
from engine.kernels.triton.philox import random_words, uniform
from tests.engine.draws import PUBLISHED_VECTORS
from tests.engine.kernels.triton.devices import DEVICE


@triton.jit(do_not_specialize=["layer", "first"])
def _draw_kernel(
    keys, positions, layer, first, words, uniforms, rows, ROWS: tl.constexpr, STREAM: tl.constexpr, SIZE: tl.constexpr
):
    row = tl.arange(0, ROWS)
    mask = row < rows
    key_0 = tl.load(keys + 2 * row, mask=mask, other=0)
    key_1 = tl.load(keys + 2 * row + 1, mask=mask, other=0)
    drawn = random_words(key_0, key_1, tl.load(positions + row, mask=mask, other=0), layer, first, STREAM, SIZE)
    place = row[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(words + place, drawn.to(tl.int64), mask=mask[:, None])
    tl.store(uniforms + place, uniform(drawn), mask=mask[:, None])


def draw(keys: Tensor, positions: Tensor, layer: int, size: int, stream: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Words and uniforms [rows, size] of indices from `first` on."""
    rows = len(keys)
    words = torch.empty(rows, size, dtype=torch.int64, device=DEVICE)
    uniforms = torch.empty(rows, size, device=DEVICE)
    _draw_kernel[(1,)](
        keys.to(DEVICE),
        positions.to(DEVICE),
        layer,
        first,
        words,
        uniforms,
        rows,
        triton.next_power_of_2(rows),
        stream,
        size,
    )
    return words.cpu(), uniforms.cpu()


def rows_of(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    keys = torch.randint(0, 2**32, (count, 2), generator=generator)
    return keys, torch.randint(0, 2**31, (count,), generator=generator)


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED_VECTORS)
def test_published_vectors(counter: str, key: str, words: str) -> None:
    block, layer, position, stream = (int(word, 16) for word in counter.split())
    keys = torch.tensor([[int(word, 16) for word in key.split()]])
    found, _ = draw(keys, torch.tensor([position]), layer, 4, stream, first=4 * block)

    assert found.tolist() == [[int(word, 16) for word in words.split()]]


@pytest.mark.parametrize("stream", [reference.STREAM_ACTIVATION, reference.STREAM_SAMPLING])
@pytest.mark.parametrize("layer", [0, 1, 79])
@pytest.mark.parametrize("count", [1, 3, 33])
def test_words_and_uniforms_equal_the_reference(count: int, layer: int, stream: int) -> None:
    keys, positions = rows_of(count)
    expected = reference.random_words(keys, positions, layer, 64, stream)

    words, uniforms = draw(keys, positions, layer, 64, stream)

    assert torch.equal(words, expected)
    assert torch.equal(uniforms, reference.uniform(expected))


def test_a_word_belongs_to_its_index_wherever_a_block_begins() -> None:
    keys, positions = rows_of(3)

    found, _ = draw(keys, positions, 5, 32, reference.STREAM_SAMPLING, first=100)

    assert torch.equal(found, reference.random_words(keys, positions, 5, 132, reference.STREAM_SAMPLING)[:, 100:])


def test_uniforms_of_extreme_words_are_inside_the_open_interval() -> None:
    keys, positions = rows_of(64)

    _, uniforms = draw(keys, positions, 0, 2048, reference.STREAM_SAMPLING)

    assert uniforms.min() >= 2.0**-24
    assert uniforms.max() <= 1 - 2.0**-24
