"""The sampler: the right distribution, the right token, and nothing of a row's batch-mates in its result."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.logits import LogitEdits
from engine.philox import STREAM_SAMPLING, derive_key, random_words, uniform
from engine.sampler import SampledToken, Sampler, SamplingRow, UnusableLogits
from engine.sampling_params import SamplingParams

SAMPLER = Sampler()
GREEDY = SamplingParams(temperature=0.0)


def row_of(
    params: SamplingParams,
    *,
    seed: int = 0,
    position: int = 0,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    ends: tuple[int, ...] = (),
) -> SamplingRow:
    return SamplingRow(params, derive_key(seed, 0), position, prompt, output, ends)


def draw(logits: Tensor, row: SamplingRow) -> SampledToken:
    return SAMPLER.sample(logits[None], [row])[0]


def draw_many(logits: Tensor, params: SamplingParams, count: int) -> Counter[int]:
    """How often each token is drawn at `count` positions of one sequence."""
    row = row_of(params, seed=5)
    rows = [row._replace(position=position) for position in range(count)]
    return Counter(token.token_id for token in SAMPLER.sample(logits.expand(count, -1), rows))


def normal(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32))


def gumbel_scores(logits: Tensor, row: SamplingRow) -> Tensor:
    """float64 scores of all tokens with the reference's noise: the largest wins."""
    key = torch.tensor([row.key])
    words = random_words(key, torch.tensor([row.position]), 0, logits.numel(), STREAM_SAMPLING)
    return logits.double() / row.params.temperature - torch.log(-torch.log(uniform(words)[0].double()))


def processed(logits: Tensor, row: SamplingRow) -> Tensor:
    """Logits of the tokens that may be drawn, -inf for the others: one rule after the other, one token at a time."""
    params, result = row.params, logits.double().clone()
    for token_id in range(len(result)):
        result[token_id] += params.logit_bias.get(token_id, 0.0)
        if token_id in row.prompt_token_ids or token_id in row.output_token_ids:
            scale = params.repetition_penalty
            result[token_id] *= 1 / scale if result[token_id] > 0 else scale
        occurrences = list(row.output_token_ids).count(token_id)
        result[token_id] -= params.frequency_penalty * occurrences + params.presence_penalty * (occurrences > 0)
        if token_id in row.end_token_ids and len(row.output_token_ids) < params.min_tokens:
            result[token_id] = -math.inf
    order = result.argsort(descending=True).tolist()[: params.top_k or None]
    weights = torch.softmax(result / params.temperature, dim=0)
    whole, mass, allowed = float(weights[order].sum()), 0.0, []
    for token_id in order:
        if mass < params.top_p * whole and weights[token_id] >= params.min_p * weights[order[0]]:
            allowed.append(token_id)
        mass += float(weights[token_id])
    masked = torch.full_like(result, -math.inf)
    masked[allowed] = result[allowed]
    return masked


def parameters(vocab: int) -> st.SearchStrategy[SamplingParams]:
    return st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 1e-3, 0.7, 1.0, 10.0]),
        top_p=st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0]),
        top_k=st.sampled_from([0, 1, 40, 700, vocab - 1, vocab, 10**9]),
        min_p=st.sampled_from([0.0, 0.05, 1.0]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        frequency_penalty=st.sampled_from([0.0, -0.5]),
        repetition_penalty=st.sampled_from([1.0, 1.2]),
        logit_bias=st.dictionaries(st.integers(0, vocab - 1), st.floats(-100, 100), max_size=2),
        min_tokens=st.sampled_from([0, 3]),
        logprobs=st.sampled_from([None, 0, 5, 20]),
    )


def sampling_rows(vocab: int) -> st.SearchStrategy[SamplingRow]:
    tokens = st.lists(st.integers(0, vocab - 1), max_size=6)
    words = st.integers(0, 2**32 - 1)
    ends = st.sampled_from([(), (2,), (2, 5)])
    return st.builds(
        SamplingRow,
        parameters(vocab),
        st.tuples(words, words),
        st.integers(0, 9000),
        tokens,
        tokens,
        ends,
        edits=st.none(),
    )


# --- a row's result is its own ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]), vocab=st.sampled_from([11, 1501, 5003]))
def test_a_row_has_the_same_bits_alone_and_in_a_batch(data: st.DataObject, dtype: torch.dtype, vocab: int) -> None:
    rows = data.draw(st.lists(sampling_rows(vocab), min_size=16, max_size=16))
    logits = normal(16, vocab, seed=data.draw(st.integers(0, 99))).to(dtype)

    batch = SAMPLER.sample(logits, rows)

    assert batch == [draw(logits[i], row) for i, row in enumerate(rows)]


def test_what_was_sampled_before_makes_no_difference() -> None:
    """Parameters of the same requests are kept from step to step."""
    sampler, logits = Sampler(), normal(3, 1501)
    first = [row_of(SamplingParams(temperature=t, top_k=40), seed=i) for i, t in enumerate((0.5, 1.0, 2.0))]
    later = [row._replace(position=7) for row in first]
    others = [row_of(row.params, seed=i + 1, position=7) for i, row in enumerate(first)]
    hotter = [row._replace(params=replace(row.params, temperature=9.0)) for row in others]
    for rows in (first, later, others, hotter, hotter[:2], hotter, first):
        some = logits[: len(rows)]
        assert sampler.sample(some, rows) == Sampler().sample(some, rows)


def test_threads_do_not_change_a_bit() -> None:
    logits = normal(9, 5003)
    rows = [row_of(SamplingParams(top_p=0.9, logprobs=5), seed=i, position=i) for i in range(9)]

    many, threads = SAMPLER.sample(logits, rows), numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        one = SAMPLER.sample(logits, rows)
    finally:
        numba.set_num_threads(threads)

    assert many == one


def test_logits_stay_as_they_were() -> None:
    logits = normal(2, 100)
    before = logits.clone()
    params = SamplingParams(logit_bias={3: 5.0}, repetition_penalty=2.0, min_tokens=4)

    SAMPLER.sample(logits, [row_of(params, prompt=[1, 2], output=[4], ends=(7,))] * 2)

    torch.testing.assert_close(logits, before, rtol=0, atol=0)


def test_rows_of_a_larger_tensor_give_the_same_tokens() -> None:
    logits = normal(8, 2, 300)
    rows = [row_of(SamplingParams(), seed=i) for i in range(8)]

    assert SAMPLER.sample(logits[:, 1], rows) == SAMPLER.sample(logits[:, 1].contiguous(), rows)


# --- the right token -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_the_token_has_the_best_gumbel_score_of_those_that_may_be_drawn(data: st.DataObject) -> None:
    row = data.draw(sampling_rows(60))
    logits = normal(60, seed=data.draw(st.integers(0, 99)))
    if row.params.temperature == 0:
        row = row._replace(params=replace(row.params, temperature=1.0))

    token_id = draw(logits, row).token_id

    scores = gumbel_scores(processed(logits, row), row)
    assert scores[token_id] >= scores.max() - 1e-5 / min(row.params.temperature, 1.0)


def test_noise_belongs_to_the_token_id_whatever_its_rank() -> None:
    row = row_of(SamplingParams(temperature=10.0), seed=3, position=17)
    logits = normal(5000)
    favourite = draw(logits, row).token_id
    others = torch.arange(5000) != favourite
    shuffled = logits.clone()
    shuffled[others] = logits[others].flip(0).minimum(logits[others])

    assert draw(shuffled, row).token_id == favourite  # only others fell, so the winner with its noise still wins


def test_temperature_zero_takes_the_lowest_id_among_the_most_likely() -> None:
    logits = normal(2000)
    logits[[31, 1500, 1999]] = logits.max() + 1
    logits[1500] = torch.nextafter(logits[31], torch.tensor(-math.inf))

    assert draw(logits, row_of(GREEDY)).token_id == 31
    assert draw(torch.tensor([-0.0, 0.0]), row_of(GREEDY)).token_id == 0
    assert draw(-torch.tensor([-0.0, 0.0]), row_of(GREEDY)).token_id == 0


@pytest.mark.parametrize("vocab", [1, 2, 7, 1023, 1024, 1025, 49152])
def test_the_last_token_can_win(vocab: int) -> None:
    logits = torch.full((vocab,), -50.0)
    logits[-1] = 50.0

    for params in (GREEDY, SamplingParams(), SamplingParams(top_p=0.5, top_k=3, min_p=0.1)):
        assert draw(logits, row_of(params)).token_id == vocab - 1


def test_different_keys_and_positions_draw_differently() -> None:
    logits = torch.zeros(5000)
    rows = [row_of(SamplingParams(), seed=seed, position=position) for seed in range(6) for position in range(6)]

    assert len({token.token_id for token in SAMPLER.sample(logits.expand(36, -1), rows)}) >= 34


def test_bias_penalties_and_min_tokens_reach_the_draw() -> None:
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0])

    def greedy(output: Sequence[int] = (), ends: tuple[int, ...] = (), **fields: object) -> int:
        return draw(logits, row_of(replace(GREEDY, **fields), output=output, ends=ends)).token_id  # type: ignore[arg-type]

    assert greedy() == 0
    assert greedy(logit_bias={3: 3.5}) == 3
    assert greedy(output=[0], presence_penalty=1.5) == 1
    assert greedy(output=[0, 0, 0, 1], frequency_penalty=1.0) == 1
    assert greedy(output=[0, 1], repetition_penalty=3.0) == 2
    assert greedy(ends=(0, 1), min_tokens=1) == 2
    assert greedy(output=[3], ends=(0, 1), min_tokens=1) == 0


def test_kept_edits_give_the_same_tokens() -> None:
    params = SamplingParams(repetition_penalty=1.3, presence_penalty=0.4, min_tokens=3)
    prompt, ends = [1, 2, 3], (0,)
    edits, output = LogitEdits(params, prompt, ends), []

    for step in range(30):
        row = row_of(params, position=step, prompt=prompt, output=output, ends=ends)
        fresh, kept = draw(normal(40, seed=step), row), draw(normal(40, seed=step), row._replace(edits=edits))
        assert fresh == kept
        output.append(fresh.token_id)


# --- the right distribution ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
def test_frequencies_match_softmax(temperature: float) -> None:
    logits, count = normal(10, scale=1.5), 40_000

    drawn = draw_many(logits, SamplingParams(temperature=temperature), count)

    for token_id, p in enumerate(torch.softmax(logits / temperature, dim=0).tolist()):
        assert abs(drawn[token_id] / count - p) <= 4 * math.sqrt(p * (1 - p) / count)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.6},
        {"top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 8, "top_p": 0.85, "min_p": 0.08},
    ],
    ids=str,
)
def test_frequencies_match_transformers(fields: dict[str, float], seed: int) -> None:
    params, count = SamplingParams(**fields), 20_000  # type: ignore[arg-type]
    logits = normal(12, seed=seed, scale=1.2)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))

    drawn = draw_many(logits, params, count)

    wanted = torch.softmax(warpers(torch.empty(1, 0), logits[None].clone())[0], dim=0)
    assert set(drawn) <= set(wanted.nonzero().flatten().tolist())
    for token_id, p in enumerate(wanted.tolist()):
        assert abs(drawn[token_id] / count - p) <= 4 * math.sqrt(p * (1 - p) / count)


def test_frequencies_are_right_across_a_large_vocabulary() -> None:
    count, vocab = 4_000, 9_001
    drawn = draw_many(torch.zeros(vocab), SamplingParams(), count)

    quarters = Counter(token_id * 4 // vocab for token_id in drawn.elements())

    assert all(abs(quarters[q] / count - 0.25) <= 4 * math.sqrt(0.25 * 0.75 / count) for q in range(4))


def test_a_cold_distribution_is_greedy_and_a_tiny_nucleus_too() -> None:
    logits = normal(3000)
    best = {int(logits.argmax())}

    assert set(draw_many(logits, SamplingParams(temperature=1e-3), 50)) == best
    assert set(draw_many(logits, SamplingParams(temperature=1e-300), 50)) == best
    assert set(draw_many(logits, SamplingParams(temperature=10.0, top_p=1e-12), 50)) == best
    assert set(draw_many(logits, SamplingParams(temperature=10.0, min_p=1.0), 50)) == best
    assert set(draw_many(logits, SamplingParams(temperature=10.0, top_k=1), 50)) == best


@pytest.mark.parametrize("fields", [{"top_k": 2}, {"top_p": 0.1}, {"min_p": 1.0}, {"temperature": 1e-300}], ids=str)
def test_equal_logits_are_kept_or_dropped_together(fields: dict[str, float]) -> None:
    logits = torch.zeros(6)

    assert set(draw_many(logits, SamplingParams(**fields), 500)) == set(range(6))  # type: ignore[arg-type]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((64,), -math.inf)
    logits[[5, 9]] = torch.tensor([-200.0, -201.0])

    for params in (SamplingParams(temperature=10.0), SamplingParams(top_k=10), SamplingParams(top_p=1 - 1e-16)):
        assert set(draw_many(logits, params, 100)) == {5, 9}


# --- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = normal(3, 4500).to(dtype)
    params = SamplingParams(temperature=2.0, top_k=5, logit_bias={7: 100.0}, logprobs=4)

    tokens = SAMPLER.sample(logits, [row_of(params, seed=i) for i in range(3)])

    wanted = torch.log_softmax(logits.double(), dim=1)
    for token, logprobs in zip(tokens, wanted, strict=True):
        assert token.token_id == 7
        assert token.logprob == pytest.approx(float(logprobs[7]), abs=1e-5)
        assert token.top is not None
        best = sorted(range(4500), key=lambda token_id: (-float(logprobs[token_id]), token_id))[:4]
        assert [token_id for token_id, _ in token.top] == best
        assert [logprob for _, logprob in token.top] == pytest.approx(logprobs[best].tolist(), abs=1e-5)


def test_alternatives_that_are_equal_come_by_id() -> None:
    token = draw(torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]), row_of(replace(GREEDY, logprobs=3)))

    assert token.top is not None
    assert [token_id for token_id, _ in token.top] == [1, 4, 0]


def test_logprobs_come_as_asked() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0])

    none, zero, many = (draw(logits, row_of(replace(GREEDY, logprobs=n))) for n in (None, 0, 20))

    half = float(np.float32(math.log(0.5)))
    assert none == SampledToken(0)
    assert zero == SampledToken(0, half, [])
    assert many == SampledToken(0, half, [(0, half), (2, half)])  # an impossible token is no alternative


# --- what cannot be sampled ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(), SamplingParams(logit_bias={1: 1.0}, min_tokens=1)], ids=str
)
def test_unusable_logits_name_their_rows(value: float, params: SamplingParams) -> None:
    logits = normal(4, 2000)
    logits[1, 1500] = logits[3, 0] = value

    with pytest.raises(UnusableLogits, match=r"row\(s\) 1, 3") as caught:
        SAMPLER.sample(logits, [row_of(params, ends=(1500, 0))] * 4)

    assert caught.value.rows == (1, 3)


def test_a_row_without_a_possible_token_is_unusable() -> None:
    rows = [row_of(GREEDY), row_of(SamplingParams(min_tokens=1), ends=(0, 1))]

    with pytest.raises(UnusableLogits) as caught:
        SAMPLER.sample(torch.zeros(2, 2), rows)

    assert caught.value.rows == (1,)


def test_no_rows_give_no_tokens_and_wrong_shapes_an_error() -> None:
    assert SAMPLER.sample(torch.empty(0, 10), []) == []
    with pytest.raises(ValueError, match=r"\(2, 10\) do not fit 1 rows"):
        SAMPLER.sample(torch.zeros(2, 10), [row_of(GREEDY)])
