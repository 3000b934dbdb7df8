"""The sampler on the device against the sampler: the same tokens, alternatives and refusals for the same logits."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.kernels.triton.sampler import TritonSampler, score_tokens
from engine.logits import LogitEdits
from engine.philox import derive_key
from engine.sampler import SampledToken, Sampler, SamplingRow, UnusableLogits
from engine.sampling_params import SamplingParams
from engine.scorer import score_tokens as score_on_cpu
from tests.engine.kernels.kinds import normal
from tests.engine.kernels.triton.devices import DEVICE

VOCAB = 300
PROMPT, OUTPUT, ENDS = [1, 2, 3, 3], [4, 4, 9], (0, 7, VOCAB + 5)
GREEDY = SamplingParams(temperature=0.0)
PARAMS = [
    GREEDY,
    SamplingParams(logprobs=3),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, logprobs=0),
    SamplingParams(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3, logprobs=2),
    SamplingParams(logit_bias={5: 9.0, 8: -100.0}, min_tokens=5, logprobs=20),
]


def row_of(params: SamplingParams, seed: int = 0, output: Sequence[int] = OUTPUT) -> SamplingRow:
    return SamplingRow(params, derive_key(seed, 0), len(PROMPT) + len(output), PROMPT, output, ENDS)


def assert_equal(found: Sequence[SampledToken], expected: Sequence[SampledToken]) -> None:
    assert [token.token_id for token in found] == [token.token_id for token in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=2e-6)
        assert (ours.top is None) == (theirs.top is None)
        for (token_id, logprob), (other_id, other) in zip(ours.top or [], theirs.top or [], strict=True):
            assert token_id == other_id
            assert logprob == pytest.approx(other, abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_and_logprobs_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    logits, rows = (3 * normal(5, VOCAB, seed=0)).to(dtype), [row_of(params, i) for i, params in enumerate(PARAMS)]
    logits[1, 10:20] = logits[1, 10]  # equal alternatives come by id

    assert_equal(TritonSampler().sample(logits.to(DEVICE), rows), Sampler().sample(logits, rows))


def test_a_row_has_the_same_result_alone_and_in_a_batch() -> None:
    logits, rows = 3 * normal(5, VOCAB, seed=1), [row_of(params, i) for i, params in enumerate(PARAMS)]
    together = TritonSampler().sample(logits.to(DEVICE), rows)

    for index in (2, 3, 4):
        assert TritonSampler().sample(logits[index : index + 1].to(DEVICE), [rows[index]]) == [together[index]]


def test_logits_stay_as_they_were() -> None:
    logits = normal(1, VOCAB, seed=0).to(DEVICE)
    before = logits.clone()

    TritonSampler().sample(logits, [row_of(PARAMS[4])])

    assert torch.equal(logits, before)


def test_kept_edits_count_on_from_step_to_step() -> None:
    params = replace(PARAMS[3], temperature=0.0, logprobs=None)
    edits, output = LogitEdits(params, PROMPT, ENDS), list[int]()
    for step in range(3):
        logits, row = normal(1, VOCAB, seed=step), row_of(params, output=list(output))
        (token,) = TritonSampler().sample(logits.to(DEVICE), [row._replace(edits=edits)])
        assert [token] == Sampler().sample(logits, [row])
        output.append(token.token_id)


def test_nothing_to_sample() -> None:
    assert TritonSampler().sample(torch.empty(0, VOCAB, device=DEVICE), []) == []


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # of NaN, in the interpreter
@pytest.mark.parametrize("params", [GREEDY, PARAMS[4]], ids=["plain", "edited"])
def test_rows_without_a_distribution_are_named(params: SamplingParams) -> None:
    logits = normal(3, VOCAB, seed=0)
    logits[1, 0] = math.nan  # of an end token, which `min_tokens` would hide

    with pytest.raises(UnusableLogits) as raised:
        TritonSampler().sample(logits.to(DEVICE), [row_of(params)] * 3)

    assert raised.value.rows == (1,)


def test_logits_of_another_number_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit 2 rows"):
        TritonSampler().sample(torch.zeros(1, VOCAB, device=DEVICE), [row_of(GREEDY)] * 2)
    with pytest.raises(ValueError, match="do not fit"):
        score_tokens(torch.zeros(1, VOCAB, device=DEVICE), torch.zeros(2, dtype=torch.int64))


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_scores_are_those_of_the_cpu() -> None:
    logits, token_ids = 3 * normal(4, VOCAB, seed=2), torch.tensor([3, 0, 299, 5])
    logits[1, 4], logits[2, 299] = math.inf, -math.inf

    found, expected = score_tokens(logits.to(DEVICE), token_ids), score_on_cpu(logits, token_ids)

    assert np.isnan(found[1])
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
