"""Requests that can never work are refused with the name of the field at fault."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine import AsyncEngine
from server.app import create_app
from server.settings import ServerSettings
from tests.server.conftest import client_of, tiny_config
from tests.server.helpers import error_of

USER = [{"role": "user", "content": "Hi"}]

# What is wrong with both endpoints, and the parameter that the error names.
SHARED: list[tuple[dict[str, Any], str]] = [
    ({"activation": {"mode": "gelu"}}, "activation.mode"),
    ({"activation": {"mode": "stochastic", "p": -0.1}}, "activation.p"),
    ({"activation": {"mode": "stochastic", "p": 1.1}}, "activation.p"),
    ({"activation": {"mode": "stochastic", "p": "high"}}, "activation.p"),
    ({"activation": {"mode": "stochastic", "seed": 2**63}}, "activation.seed"),
    ({"activation": {"mode": "stochastic", "scope": "prompt"}}, "activation.scope"),
    ({"activation": {"mode": "silu", "p": 0.5}}, "activation.p"),
    ({"activation": {"mode": "relu", "seed": 1}}, "activation.seed"),
    ({"activation": {"mode": "silu", "q": 0.5}}, "activation.q"),
    ({"activation": "silu"}, "activation"),
    ({"temperature": 1e9}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"n": True}, "n"),
    ({"n": "2"}, "n"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": ["x" * 1000]}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": 3}, "stop"),
    ({"stop": ["x", 3]}, "stop"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [320]}, "stop_token_ids"),
    ({"logit_bias": {"5": 1000}}, "logit_bias"),
    ({"logit_bias": {"320": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"five": 1}}, "logit_bias"),
    ({"logit_bias": {"5": "x"}}, "logit_bias.5"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_everything": True}}, "stream_options.include_everything"),
    ({"model": 3}, "model"),
    ({"guided_json": {}}, "guided_json"),
]

COMPLETION: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [320]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2**70]}, "prompt"),
    ({"prompt": [[1, 2], [3, 320]]}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": True, "logprobs": 1}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "the end"}, "suffix"),
]

CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [*USER, {"role": "user", "content": "x", "tool_calls": []}]}, "messages[1].tool_calls"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
    ),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ({"tools": []}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": []}, "functions"),
    ({"modalities": ["text"]}, "modalities"),
    ({"audio": {}}, "audio"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
]

CASES = [
    *(("/v1/completions", {"prompt": "Hi", **fields}, param) for fields, param in SHARED + COMPLETION),
    *(("/v1/chat/completions", {"messages": USER, **fields}, param) for fields, param in SHARED + CHAT),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": USER}, "prompt"),
    ("/tokenize", {"prompt": ["a"]}, "prompt"),
    ("/detokenize", {"tokens": [320]}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/detokenize", {"tokens": "a"}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "param"), CASES, ids=lambda value: str(value)[:60])
async def test_field_is_named(client: httpx.AsyncClient, path: str, body: dict[str, Any], param: str) -> None:
    error = error_of(await client.post(path, json=body), 400)

    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    ("field", "param"),
    [
        ('"temperature": %s', "temperature"),
        ('"top_p": %s', "top_p"),
        ('"min_p": %s', "min_p"),
        ('"presence_penalty": %s', "presence_penalty"),
        ('"repetition_penalty": %s', "repetition_penalty"),
        ('"logit_bias": {"5": %s}', "logit_bias"),
        ('"activation": {"mode": "stochastic", "p": %s}', "activation.p"),
        ('"n": %s', "n"),
        ('"max_tokens": %s', "max_tokens"),
    ],
)
async def test_numbers_that_are_none_are_refused(
    client: httpx.AsyncClient, field: str, param: str, number: str
) -> None:
    body = '{"prompt": "Hi", ' + field % number + "}"
    response = await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})

    assert error_of(response, 400)["param"] == param


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"prompt": "Hi",}', b"[]", b'"Hi"', b"\xff\xfe", b"[" * 9000, b'{"n": ' + b"9" * 5000 + b"}"]
)
async def test_malformed_bodies(client: httpx.AsyncClient, path: str, body: bytes) -> None:
    response = await client.post(path, content=body, headers={"content-type": "application/json"})

    assert error_of(response, 400)["type"] == "invalid_request_error"


async def test_body_of_another_type_says_which_one_is_needed(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", data={"prompt": "Hi"})

    assert "application/json" in error_of(response, 400)["message"]


@pytest.mark.parametrize("body", [r'{"prompt": "\ud800"}', r'{"prompt": "a", "stop": "\udc00"}', r'{"\ud800": 1}'])
async def test_lone_surrogates(client: httpx.AsyncClient, body: str) -> None:
    response = await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})

    error_of(response, 400)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
async def test_unknown_model(client: httpx.AsyncClient, path: str) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "Hi"},
        "/v1/chat/completions": {"messages": USER},
        "/tokenize": {"prompt": "Hi"},
        "/detokenize": {"tokens": [5]},
    }
    error = error_of(await client.post(path, json={**bodies[path], "model": "gpt-4"}), 404)

    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert "'tiny'" in error["message"]


async def test_prompt_longer_than_the_context(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    prompt = [5] * (engine.info.max_model_len + 1)
    error = error_of(await client.post("/v1/completions", json={"prompt": prompt}), 400)

    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    assert str(engine.info.max_model_len) in error["message"]


async def test_one_bad_prompt_refuses_all(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    error = error_of(await client.post("/v1/completions", json={"prompt": [[5, 6], [5] * 1000]}), 400)

    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("chunked", [False, True])
async def test_body_too_long(client: httpx.AsyncClient, chunked: bool) -> None:
    body = b'{"prompt": "' + b"x" * 70_000 + b'"}'

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    content = chunks() if chunked else body
    response = await client.post("/v1/completions", content=content, headers={"content-type": "application/json"})

    assert "65536 bytes" in error_of(response, 413)["message"]


async def test_path_and_method(client: httpx.AsyncClient) -> None:
    assert error_of(await client.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(await client.get("/v1/completions"), 405)["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("activation", "param"),
    [({"mode": "relu"}, "activation.mode"), ({"mode": "stochastic", "p": 0.5}, "activation.p")],
)
async def test_untuned_activation_says_what_is_supported_and_how_to_allow_it(
    tiny_model: Path, activation: dict[str, Any], param: str
) -> None:
    engine = AsyncEngine(tiny_config(tiny_model, allow_untuned_activations=False))
    app = create_app(engine, ServerSettings())
    async with app.router.lifespan_context(app), client_of(app) as client:
        response = await client.post("/v1/completions", json={"prompt": "Hi", "activation": activation})

    error = error_of(response, 400)
    assert error["param"] == param
    assert error["code"] == "untuned_activation"
    assert "'stochastic' with p in [0.7, 1]" in error["message"]
    assert "--allow-untuned-activations" in error["message"]
