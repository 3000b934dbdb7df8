"""Each sampling parameter: what it may be, and that a refusal names it."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.sampling_params import (
    MAX_LOGIT_BIAS_ENTRIES,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TEMPERATURE,
    SEED_MAX,
    SEED_MIN,
    SamplingParams,
)

NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE: dict[str, list[Any]] = {
    "temperature": [-0.1, MAX_TEMPERATURE + 0.1, NAN, INF, True, "1", None],
    "top_p": [0.0, -0.5, 1.1, NAN, True, "1", None],
    "min_p": [-0.1, 1.1, NAN, False, None],
    "presence_penalty": [-2.1, 2.1, NAN, -INF, None],
    "frequency_penalty": [-2.1, 2.1, NAN, -INF, None],
    "repetition_penalty": [0.0, -1.0, 10.1, NAN, None],
    "top_k": [-1, 1.5, True, None],
    "min_tokens": [-1, 1.0, True, None],
    "max_tokens": [0, -1, 2.0, True],
    "n": [0, -1, MAX_N + 1, 1.0, True, None],
    "logprobs": [-1, MAX_LOGPROBS + 1, 1.0, True],
    "seed": [SEED_MIN - 1, SEED_MAX + 1, 1.0, True, "1"],
    "logit_bias": [{1: 100.5}, {1: -101}, {1: NAN}, {1: "1"}, dict.fromkeys(range(MAX_LOGIT_BIAS_ENTRIES + 1), 1.0)],
    "stop": ["", ["a", ""], [3], ["x" * (MAX_STOP_STRING_CHARS + 1)], ["x"] * (MAX_STOP_STRINGS + 1)],
    "stop_token_ids": [[1] * (MAX_STOP_TOKEN_IDS + 1)],
}
EXTREMES: dict[str, list[Any]] = {
    "temperature": [0, 0.0, MAX_TEMPERATURE],
    "top_p": [1e-9, 1],
    "min_p": [0, 1],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "repetition_penalty": [1e-9, 10],
    "top_k": [0, 10**9],
    "min_tokens": [0, 10**6],
    "max_tokens": [None, 1, 10**9],
    "n": [1, MAX_N],
    "logprobs": [None, 0, MAX_LOGPROBS],
    "seed": [None, SEED_MIN, 0, SEED_MAX],
    "logit_bias": [{}, {0: -100, 1: 100}, dict.fromkeys(range(MAX_LOGIT_BIAS_ENTRIES), 1.0)],
    "stop": [(), ("x" * MAX_STOP_STRING_CHARS,) * MAX_STOP_STRINGS],
    "stop_token_ids": [(), (1,) * MAX_STOP_TOKEN_IDS],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(field, value, id=f"{field}-{index}") for field in table for index, value in enumerate(table[field])
    ]


@pytest.mark.parametrize(("field", "value"), cases(OUT_OF_RANGE))
def test_a_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParams(**{field: value})  # type: ignore[arg-type]

    assert refusal.value.field == field
    assert refusal.value.message == str(refusal.value)
    assert any(character.isdigit() for character in refusal.value.message) or "non-empty" in refusal.value.message


@pytest.mark.parametrize(("field", "value"), cases(EXTREMES))
def test_the_ends_of_each_range_are_allowed(field: str, value: object) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value  # type: ignore[arg-type]


def test_every_field_but_the_one_without_a_range_is_covered() -> None:
    assert {*SamplingParams.__slots__} - {*OUT_OF_RANGE} == {"ignore_eos"}
    assert OUT_OF_RANGE.keys() == EXTREMES.keys()


def test_min_tokens_beyond_max_tokens() -> None:
    with pytest.raises(InvalidRequest, match=r"min_tokens \(5\) exceeds max_tokens \(4\)") as refusal:
        SamplingParams(min_tokens=5, max_tokens=4)

    assert refusal.value.field == "min_tokens"
    assert SamplingParams(min_tokens=4, max_tokens=4).min_tokens == 4


def test_one_stop_string_may_stand_alone() -> None:
    assert SamplingParams(stop="\n").stop == ("\n",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[1, 2]).stop_token_ids == (1, 2)


def test_the_caller_keeps_no_hand_on_the_lists() -> None:
    stop, stop_token_ids = ["a"], [1]
    sampling = SamplingParams(stop=stop, stop_token_ids=stop_token_ids)

    stop.append("b")
    stop_token_ids.append(2)

    assert (sampling.stop, sampling.stop_token_ids) == (("a",), (1,))
    with pytest.raises(FrozenInstanceError):
        sampling.temperature = 2.0  # type: ignore[misc]
