"""From arguments to the request."""

import json
import re
from typing import Any

import pytest

from server.protocol import ChatCompletionRequest, CompletionRequest
from siluette_client import Activation, Options
from siluette_client.requests import KNOWN_OPTIONS, chat_call, compare_calls, generate_call, get_call, stream_call


def test_what_is_not_given_is_not_sent() -> None:
    assert generate_call("Hi", None, {}).body == {"prompt": "Hi"}
    assert generate_call("Hi", None, {"temperature": None, "timeout": 3, "headers": {}}).body == {"prompt": "Hi"}


@pytest.mark.parametrize(
    ("activation", "sent"),
    [
        ("relu", {"mode": "relu"}),
        (Activation.silu(), {"mode": "silu"}),
        (Activation.stochastic(), {"mode": "stochastic"}),
        (Activation.stochastic(0.0, seed=0), {"mode": "stochastic", "p": 0.0, "seed": 0}),
        (Activation.relu(scope="decode"), {"mode": "relu", "scope": "decode"}),
        (Activation.model_validate({"mode": "gelu", "q": 3}), {"mode": "gelu", "q": 3}),
    ],
)
def test_activation(activation: Any, sent: dict[str, object]) -> None:
    body = generate_call("Hi", activation, {}).body

    assert body is not None
    assert body["activation"] == sent


def test_a_text_is_a_users_message() -> None:
    body = chat_call("Hi", None, {}).body

    assert body == {"messages": [{"role": "user", "content": "Hi"}]}


def test_logprobs_have_each_endpoints_form() -> None:
    completion, chat = generate_call("Hi", None, {"logprobs": 0}).body, chat_call("Hi", None, {"logprobs": 0}).body

    assert completion is not None
    assert completion["logprobs"] == 0
    assert chat is not None
    assert (chat["logprobs"], chat["top_logprobs"]) == (True, 0)


def test_streams_ask_for_token_counts() -> None:
    for call in (stream_call("Hi", None, None, {}), stream_call(None, "Hi", None, {})):
        assert call.body is not None
        assert call.body["stream_options"] == {"include_usage": True}


def test_extra_body_has_the_last_word() -> None:
    body = generate_call("Hi", None, {"n": 2, "extra_body": {"n": 3, "future": True}}).body

    assert body == {"prompt": "Hi", "n": 3, "future": True}


def test_every_option_is_a_field_of_the_server() -> None:
    """All of the server's fields can be given, and the server knows all that can be given."""
    ours = KNOWN_OPTIONS - {"timeout", "headers", "extra_body"}
    set_otherwise = {"prompt", "messages", "activation", "stream", "stream_options", "top_logprobs"}
    of_no_use = {"best_of", "user", "response_format", "max_completion_tokens"}  # one value, unread, or another name
    theirs = {*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields}

    assert ours == theirs - set_otherwise - of_no_use


def test_the_documentation_of_options_names_each() -> None:
    documented = set(re.findall(r"^        (\w+):", Options.__doc__ or "", re.MULTILINE))

    assert documented == KNOWN_OPTIONS - {"timeout", "headers"}


def test_a_misspelt_option_is_a_type_error_that_names_it() -> None:
    misspelt: Any = {"temprature": 1}
    for call in (
        lambda: generate_call("Hi", None, misspelt),
        lambda: chat_call("Hi", None, misspelt),
        lambda: get_call("/v1/models", misspelt),
    ):
        with pytest.raises(TypeError, match=r"unknown option 'temprature'; the options are .*headers"):
            call()


@pytest.mark.parametrize(("prompt", "messages"), [(None, None), ("Hi", "Hi")])
def test_a_stream_has_a_prompt_or_messages(prompt: str | None, messages: str | None) -> None:
    with pytest.raises(TypeError, match="either a prompt or messages"):
        stream_call(prompt, messages, None, {})


def test_a_comparison_has_one_seed() -> None:
    calls = compare_calls("Hi", None, ["silu", "relu"], {})
    again = compare_calls("Hi", None, ["silu", "relu"], {})
    seeds = [call.body["seed"] for call in (*calls, *again) if call.body]

    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert all(call.body and call.body["seed"] == 7 for call in compare_calls("Hi", None, ["silu"], {"seed": 7}))


def test_a_comparison_needs_activations() -> None:
    with pytest.raises(ValueError, match="at least one activation"):
        compare_calls("Hi", None, [], {})
    with pytest.raises(TypeError, match="list of activations, got 'relu'"):
        compare_calls("Hi", None, "relu", {})  # type: ignore[arg-type]


def test_half_of_a_surrogate_pair_reaches_the_server() -> None:
    content = generate_call("\ud83d", None, {}).content

    assert content is not None
    assert json.loads(content)["prompt"] == "\ud83d"


def test_nan_is_refused_before_it_is_sent() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        _ = generate_call("Hi", None, {"temperature": float("nan")}).content
