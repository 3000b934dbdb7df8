"""`/v1/chat/completions`, streamed and not."""

from typing import Any

import httpx
import pytest

from engine import AsyncEngine
from tests.server.helpers import MODES, error_of, events_of, mode_id

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
REQUEST = {"messages": MESSAGES, "max_completion_tokens": 10, "ignore_eos": True, "seed": 5}


async def chat(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/chat/completions", json={**REQUEST, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    return events_of(await client.post("/v1/chat/completions", json={**REQUEST, "stream": True, **fields}))


@pytest.mark.parametrize("activation", MODES, ids=mode_id)
async def test_streamed_message_equals_the_whole_answer(client: httpx.AsyncClient, activation: dict[str, Any]) -> None:
    whole = await chat(client, activation=activation, n=2)
    events = await stream(client, activation=activation, n=2)

    assert whole["object"] == "chat.completion"
    assert all(event["object"] == "chat.completion.chunk" for event in events)
    assert events[0]["activation"] == whole["activation"]
    for choice in whole["choices"]:
        pieces = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
        assert choice["message"]["role"] == "assistant"
        assert "".join(piece["delta"]["content"] for piece in pieces) == choice["message"]["content"]
        assert [piece["delta"].get("role") for piece in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
        assert [piece["sparsity"] for piece in pieces] == [None] * (len(pieces) - 1) + [choice["sparsity"]]


async def test_prompt_is_the_chat_template(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    answer = await chat(client)
    completion = await client.post(
        "/v1/completions",
        json={
            "prompt": engine.tokenizer.encode_chat(MESSAGES),
            "max_tokens": 10,
            "ignore_eos": True,
            "seed": 5,
        },
    )

    assert answer["choices"][0]["message"]["content"] == completion.json()["choices"][0]["text"]
    assert answer["usage"]["prompt_tokens"] == completion.json()["usage"]["prompt_tokens"]


async def test_developer_and_text_parts_are_system_and_joined_text(client: httpx.AsyncClient) -> None:
    plain = await chat(
        client, messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}]
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = await chat(
        client, messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    )

    assert answer["choices"] == plain["choices"]


async def test_max_tokens_is_the_older_name(client: httpx.AsyncClient) -> None:
    answer = await chat(client, max_completion_tokens=None, max_tokens=4)

    assert answer["usage"]["completion_tokens"] == 4


async def test_without_a_limit_the_context_is_filled(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    answer = await chat(client, max_completion_tokens=None)

    assert answer["usage"]["total_tokens"] == engine.info.max_model_len
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_logprobs(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    answer = await chat(client, logprobs=True, top_logprobs=2)

    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 10
    assert (
        b"".join(bytes(token["bytes"]) for token in content)
        .decode("utf-8", "replace")
        .startswith(answer["choices"][0]["message"]["content"][:1])
    )
    for token in content:
        best, second = token["top_logprobs"]
        assert best["logprob"] >= second["logprob"]
        assert token["logprob"] <= best["logprob"]
    streamed = [event["choices"][0]["logprobs"] for event in await stream(client, logprobs=True, top_logprobs=2)]
    tokens = [token["token"] for piece in streamed if piece is not None for token in piece["content"]]
    assert tokens == [token["token"] for token in content]


async def test_logprobs_without_alternatives(client: httpx.AsyncClient) -> None:
    answer = await chat(client, logprobs=True)

    assert all(token["top_logprobs"] == [] for token in answer["choices"][0]["logprobs"]["content"])


async def test_response_format_text_is_what_is_done_anyway(client: httpx.AsyncClient) -> None:
    assert (await chat(client, response_format={"type": "text"}))["choices"] == (await chat(client))["choices"]


async def test_too_long_conversation_names_messages(client: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "word " * 300}]
    error = error_of(await client.post("/v1/chat/completions", json={"messages": messages}), 400)

    assert error["param"] == "messages"
    assert error["code"] == "context_length_exceeded"


async def test_limit_is_named_as_it_was_sent(client: httpx.AsyncClient) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        request = {"messages": MESSAGES, field: 0}
        assert error_of(await client.post("/v1/chat/completions", json=request), 400)["param"] == field
