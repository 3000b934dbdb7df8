"""Bias, penalties and `min_tokens`, against a loop over the vocabulary and against transformers."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from engine.errors import InvalidRequest
from engine.logits import LogitEdits, TokenCounts, check_token_ids, edits_logits
from engine.sampling_params import SamplingParams

VOCAB = 50
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=200)


def logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


def edited(params: SamplingParams, prompt: list[int], output: list[int], ends: tuple[int, ...] = ()) -> np.ndarray:
    row = logits()
    LogitEdits(params, prompt, ends).apply(row, output)
    return row


def edited_one_by_one(params: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray:
    row = logits().astype(np.float64)
    for token_id in range(VOCAB):
        row[token_id] += params.logit_bias.get(token_id, 0.0)
        if token_id in prompt or token_id in output:
            positive = row[token_id] > 0
            row[token_id] *= 1 / params.repetition_penalty if positive else params.repetition_penalty
        row[token_id] -= params.frequency_penalty * output.count(token_id)
        row[token_id] -= params.presence_penalty * (token_id in output)
    return row


@given(
    prompt=TOKENS,
    output=TOKENS,
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=5),
    repetition=st.sampled_from([0.5, 1.0, 1.3]),
    presence=st.sampled_from([-2.0, 0.0, 0.7]),
    frequency=st.sampled_from([-0.1, 0.0, 2.0]),
)
def test_edits_equal_a_loop_over_the_vocabulary(
    prompt: list[int], output: list[int], bias: dict[int, float], repetition: float, presence: float, frequency: float
) -> None:
    params = SamplingParams(
        logit_bias=bias, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )

    row = edited(params, prompt, output)

    np.testing.assert_allclose(row, edited_one_by_one(params, prompt, output), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("penalty", [0.5, 1.1, 5.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    prompt, output = [1, 2, 3, 3, 7], [9, 9, 2]
    processor = RepetitionPenaltyLogitsProcessor(penalty)

    row = edited(SamplingParams(repetition_penalty=penalty), prompt, output)

    wanted = processor(torch.tensor([prompt + output]), torch.from_numpy(logits())[None])[0]
    np.testing.assert_allclose(row, wanted.numpy(), rtol=1e-6)


def test_an_extreme_repetition_penalty_stays_finite() -> None:
    row = edited(SamplingParams(repetition_penalty=1e-300), list(range(VOCAB)), [])

    assert np.isfinite(row).all()


@given(prompt=TOKENS, output=TOKENS, cuts=st.lists(st.integers(0, 200), max_size=5))
def test_counting_in_steps_equals_counting_at_once(prompt: list[int], output: list[int], cuts: list[int]) -> None:
    counts = TokenCounts(prompt)

    for cut in sorted(cuts):
        counts.update(output[:cut])
    counts.update(output)

    assert counts.token_ids.tolist() == list(dict.fromkeys(prompt + output))
    assert dict(zip(counts.token_ids.tolist(), counts.counts.tolist(), strict=True)) == {
        token_id: Counter(output)[token_id] for token_id in prompt + output
    }


def test_output_that_shrinks_is_an_error() -> None:
    counts = TokenCounts()
    counts.update([1, 2])

    with pytest.raises(ValueError, match="2 output tokens were counted, now there are 1"):
        counts.update([1])


def test_edits_kept_from_step_to_step_equal_fresh_ones() -> None:
    params = SamplingParams(repetition_penalty=1.2, frequency_penalty=0.5, logit_bias={3: 1.0})
    output = np.random.default_rng(1).integers(0, VOCAB, 300).tolist()
    edits = LogitEdits(params, [1, 2], ())

    for length in range(0, len(output), 7):
        row = logits()
        edits.apply(row, output[:length])

        np.testing.assert_array_equal(row, edited(params, [1, 2], output[:length]))


def test_end_tokens_are_impossible_before_min_tokens_only() -> None:
    params = SamplingParams(min_tokens=2)

    early, late = edited(params, [], [5], ends=(4, 6, VOCAB + 3)), edited(params, [], [5, 5], ends=(4, 6))

    assert np.flatnonzero(early == -np.inf).tolist() == [4, 6]
    np.testing.assert_array_equal(late, logits())


def test_rows_that_need_no_edits_are_recognised() -> None:
    assert not edits_logits(SamplingParams(temperature=0.3, top_p=0.5, logprobs=3), 0)
    assert not edits_logits(SamplingParams(min_tokens=3), 3)
    assert edits_logits(SamplingParams(min_tokens=3), 2)
    for changed in (
        {"logit_bias": {1: 2.0}},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
    ):
        assert edits_logits(SamplingParams(**changed), 9)


@pytest.mark.parametrize("token_id", [-1, VOCAB])
@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids"])
def test_token_ids_outside_the_vocabulary_are_refused(field: str, token_id: int) -> None:
    value = {token_id: 1.0} if field == "logit_bias" else (token_id,)

    with pytest.raises(
        InvalidRequest, match=rf"{field} has the token id {token_id}; ids must be in \[0, 49\]"
    ) as caught:
        check_token_ids(SamplingParams(**{field: value}), VOCAB)

    assert caught.value.field == field
