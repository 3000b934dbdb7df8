"""From request bodies to the engine's parameters."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import Activation, SamplingParams
from server.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest

BOTH: list[tuple[type[GenerationRequest], dict[str, Any]]] = [
    (CompletionRequest, {"prompt": "x"}),
    (ChatCompletionRequest, {"messages": [{"role": "user", "content": "x"}]}),
]


def test_bare_requests_take_the_engines_defaults() -> None:
    completion = CompletionRequest.model_validate({"prompt": "x"})
    chat = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": "x"}]})

    assert completion.to_sampling() == SamplingParams(max_tokens=16)
    assert chat.to_sampling() == SamplingParams()
    assert chat.activation.to_activation() == Activation()


def test_every_sampling_parameter_can_be_sent() -> None:
    values: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -3},
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "min_tokens": 2,
        "max_tokens": 9,
        "ignore_eos": True,
        "seed": -4,
        "logprobs": 2,
        "n": 3,
    }
    assert set(values) == {field.name for field in dataclasses.fields(SamplingParams)}
    expected = SamplingParams(**values | {"logit_bias": {5: -3.0}})

    assert CompletionRequest.model_validate({"prompt": "x", **values}).to_sampling() == expected
    chat = {"logprobs": True, "top_logprobs": 2, "messages": [{"role": "user", "content": "x"}]}
    assert ChatCompletionRequest.model_validate({**values, **chat}).to_sampling() == expected


@given(
    st.one_of(
        st.text(alphabet=st.characters(codec="utf-8")),
        st.lists(st.text(alphabet=st.characters(codec="utf-8")), min_size=1),
        st.lists(st.integers(), min_size=1),
        st.lists(st.lists(st.integers()), min_size=1),
    )
)
def test_prompts_of_every_form(prompt: Any) -> None:
    prompts = CompletionRequest.model_validate({"prompt": prompt}).prompt

    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    assert prompts == ([prompt] if single else prompt)


@pytest.mark.parametrize("stop", ["end", ["end"]])
def test_stop_is_a_string_or_a_list(stop: Any) -> None:
    assert CompletionRequest.model_validate({"prompt": "x", "stop": stop}).to_sampling().stop == ("end",)


@pytest.mark.parametrize(("model", "body"), BOTH)
def test_null_means_not_sent(model: type[GenerationRequest], body: dict[str, Any]) -> None:
    nulls = dict.fromkeys(name for name in model.model_fields if name not in body)

    assert model.model_validate({**body, **nulls}) == model.model_validate(body)
