"""Log-probabilities of known tokens, from logits."""

import numpy as np
import pytest
import torch

from engine.scorer import score_tokens

ROWS, VOCABULARY = 7, 1000


def logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (5 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(1))).to(dtype)


TOKENS = torch.tensor([0, 999, 5, 5, 17, 333, 640])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_log_softmax(dtype: torch.dtype) -> None:
    expected = logits(dtype).double().log_softmax(-1)[torch.arange(ROWS), TOKENS]

    found = score_tokens(logits(dtype), TOKENS)

    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=3e-6)


def test_a_row_has_the_same_bits_alone() -> None:
    together = score_tokens(logits(), TOKENS)

    alone = np.concatenate([score_tokens(logits()[i : i + 1], TOKENS[i : i + 1]) for i in range(ROWS)])

    assert np.array_equal(together, alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_without_a_distribution_gives_nan_and_spoils_no_other(value: float) -> None:
    spoilt = logits()
    spoilt[2, 700] = value

    found = score_tokens(spoilt, TOKENS)

    others = [0, 1, 3, 4, 5, 6]
    assert np.isnan(found[2])
    assert np.array_equal(found[others], score_tokens(logits(), TOKENS)[others])


def test_an_impossible_token_has_probability_zero() -> None:
    impossible = logits()
    impossible[0, 0] = -torch.inf
    assert score_tokens(impossible, TOKENS)[0] == -np.inf


def test_no_rows_have_no_scores() -> None:
    assert score_tokens(torch.empty(0, VOCABULARY), torch.empty(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("shape", [(ROWS - 1, VOCABULARY), (VOCABULARY,)])
def test_shapes_must_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        score_tokens(torch.zeros(shape), TOKENS)
