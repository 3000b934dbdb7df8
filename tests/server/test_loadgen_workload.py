"""Workloads follow from their settings alone."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.loadgen_workload import FIRST_WORD, MODES, WORDS, Length, ModeMix, Vocabulary, Workload, plan_requests

WORKLOAD = Workload(40, Length(32, 8), Length(16, 4), ModeMix.parse("silu,stochastic,relu"), request_rate=5.0, seed=7)
EXACT = Vocabulary(WORDS, base_tokens=1, exact=True)


def tokens_of(prompt: str) -> int:
    return len(prompt.split())  # with EXACT, a word is a token


class TestLength:
    @pytest.mark.parametrize(
        ("text", "length"), [("128", Length(128)), ("128+-64", Length(128, 64)), (" 8 ± 7 ", Length(8, 7))]
    )
    def test_parses(self, text: str, length: Length) -> None:
        assert Length.parse(text) == length
        assert Length.parse(str(length)) == length

    @pytest.mark.parametrize("text", ["", "x", "0", "-1", "1.5", "8+-8", "8+-", "8-10", "10+-2+-1", "٣"])
    def test_refuses(self, text: str) -> None:
        with pytest.raises(ValueError, match="a length must be"):
            Length.parse(text)

    @given(st.integers(1, 1000), st.data())
    def test_draws_within_its_range(self, mean: int, data: st.DataObject) -> None:
        spread = data.draw(st.integers(0, mean - 1))
        drawn = Length(mean, spread).draw(random.Random(data.draw(st.integers())))
        assert mean - spread <= drawn <= mean + spread


class TestModeMix:
    @pytest.mark.parametrize(
        ("text", "weights"),
        [
            ("silu", (("silu", 1.0),)),
            ("silu=1,stochastic=1,relu=2", (("silu", 1.0), ("stochastic", 1.0), ("relu", 2.0))),
            ("relu = 0.5, silu", (("silu", 1.0), ("relu", 0.5))),
            ("silu=0,relu=3", (("relu", 3.0),)),
        ],
    )
    def test_parses(self, text: str, weights: tuple[tuple[str, float], ...]) -> None:
        assert ModeMix.parse(text).weights == weights
        assert ModeMix.parse(str(ModeMix.parse(text))) == ModeMix.parse(text)

    @pytest.mark.parametrize(
        "text", ["", "gelu", "silu=x", "silu=", "silu=-1", "silu=nan", "silu=inf", "silu,silu", "silu=0", "silu,", "=1"]
    )
    def test_refuses(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"mode mix|the weight of"):
            ModeMix.parse(text)

    @given(
        st.dictionaries(st.sampled_from(MODES), st.floats(0.01, 100), min_size=1),
        st.integers(1, 500),
        st.integers(),
    )
    def test_shares_are_exact_to_within_one_request(self, weights: dict[str, float], count: int, seed: int) -> None:
        mix = ModeMix(tuple(weights.items()))
        assigned = mix.assign(count, random.Random(seed))
        assert len(assigned) == count
        for mode, weight in weights.items():
            assert abs(assigned.count(mode) - count * weight / sum(weights.values())) < 1


class TestVocabulary:
    def test_words_are_distinct(self) -> None:
        assert len(set(WORDS)) == len(WORDS)

    def test_keeps_words_that_add_one_token(self) -> None:
        added = {word: 1 + (len(word) > 6) for word in WORDS}
        vocabulary = Vocabulary.from_counts(3, added)
        assert vocabulary.exact
        assert vocabulary.base_tokens == 3
        assert vocabulary.words == tuple(word for word in WORDS if len(word) <= 6)

    def test_is_approximate_with_too_few_such_words(self) -> None:
        vocabulary = Vocabulary.from_counts(3, dict.fromkeys(WORDS, 2) | {WORDS[0]: 1})
        assert vocabulary == Vocabulary(WORDS, 3, exact=False)


class TestPlanRequests:
    def test_same_settings_give_the_same_requests(self) -> None:
        assert plan_requests(WORKLOAD, EXACT) == plan_requests(WORKLOAD, EXACT)

    @pytest.mark.parametrize("other", [{"seed": 8}, {"phase": "warm-up"}])
    def test_seed_and_phase_give_others(self, other: dict[str, object]) -> None:
        first = plan_requests(WORKLOAD, EXACT)
        if "phase" in other:
            second = plan_requests(WORKLOAD, EXACT, "warm-up")
        else:
            second = plan_requests(replace(WORKLOAD, seed=8), EXACT)
        assert not {request.prompt for request in first} & {request.prompt for request in second}

    def test_all_but_the_words_is_the_same_for_every_tokenizer(self) -> None:
        one, other = plan_requests(WORKLOAD, EXACT), plan_requests(WORKLOAD, Vocabulary(WORDS[:40], base_tokens=9))
        assert [replace(request, prompt="") for request in one] == [replace(request, prompt="") for request in other]
        assert {request.prompt for request in one} != {request.prompt for request in other}

    def test_lengths_are_exact_and_use_the_whole_range(self) -> None:
        requests = plan_requests(replace(WORKLOAD, num_requests=400), EXACT)
        assert {tokens_of(request.prompt) for request in requests} == set(range(24, 41))
        assert {request.max_tokens for request in requests} == set(range(12, 21))

    def test_base_tokens_count_towards_the_length(self) -> None:
        requests = plan_requests(replace(WORKLOAD, prompt_tokens=Length(32)), replace(EXACT, base_tokens=10))
        assert {tokens_of(request.prompt) for request in requests} == {32 - 10 + 1}

    def test_prompts_share_the_prefix_that_was_asked_for_and_no_more(self) -> None:
        requests = plan_requests(replace(WORKLOAD, shared_prefix_tokens=10), EXACT)
        words = [request.prompt.split() for request in requests]
        assert all(prompt[0] == FIRST_WORD for prompt in words)
        assert len({tuple(prompt[:11]) for prompt in words}) == 1
        assert len({tuple(prompt[11:15]) for prompt in words}) == len(words)

    def test_arrivals_have_the_mean_rate(self) -> None:
        requests = plan_requests(replace(WORKLOAD, num_requests=2000), EXACT)
        arrivals = [request.arrival for request in requests]
        assert arrivals[0] == 0
        assert arrivals == sorted(arrivals)
        # 2000 exponential gaps: their mean has a standard error of 1 / sqrt(2000), so this is over 4 of them
        assert arrivals[-1] / 1999 == pytest.approx(1 / 5, rel=0.1)

    def test_without_a_rate_all_arrive_at_once(self) -> None:
        requests = plan_requests(replace(WORKLOAD, request_rate=math.inf), EXACT)
        assert {request.arrival for request in requests} == {0.0}

    @pytest.mark.parametrize(
        "change",
        [{"num_requests": 0}, {"request_rate": 0.0}, {"request_rate": math.nan}, {"shared_prefix_tokens": 24}],
    )
    def test_impossible_settings_are_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="must be"):
            replace(WORKLOAD, **change)
