"""The real `openai` client against a real server process."""

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.e2e.conftest import ServerProcess

pytestmark = pytest.mark.slow

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "silu": {"mode": "silu"},
    "stochastic": {"mode": "stochastic", "p": 0.8, "seed": 11},
    "stochastic-decode": {"mode": "stochastic", "p": 0.8, "seed": 11, "scope": "decode"},
    "relu": {"mode": "relu"},
}
PROMPTS = ["The capital of France is", "Once upon a time there was", "def add(a, b):", "Water boils at"]


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=None) as client:
        yield client


async def streamed_text(client: AsyncOpenAI, **request: Any) -> dict[int, str]:
    """Text of each choice, in pieces put together."""
    texts: dict[int, str] = defaultdict(str)
    finished: set[int] = set()
    async for chunk in await client.completions.create(stream=True, **request):
        for choice in chunk.choices:
            assert choice.index not in finished
            texts[choice.index] += choice.text
            if choice.finish_reason is not None:
                finished.add(choice.index)
    assert finished == set(texts)
    return dict(texts)


async def test_the_model_is_listed(client: AsyncOpenAI, server: ServerProcess) -> None:
    models = await client.models.list()

    assert [model.id for model in models.data] == [server.model]
    assert (await client.models.retrieve(server.model)).id == server.model


async def test_greedy_text_makes_sense(client: AsyncOpenAI, server: ServerProcess) -> None:
    completion = await client.completions.create(
        model=server.model, prompt="The capital of France is", max_tokens=8, temperature=0
    )

    assert "Paris" in completion.choices[0].text


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
async def test_completion_streamed_and_not(
    client: AsyncOpenAI, server: ServerProcess, activation: dict[str, Any]
) -> None:
    request: dict[str, Any] = {
        "model": server.model,
        "prompt": PROMPTS[1],
        "max_tokens": 24,
        "n": 2,
        "seed": 3,
        "extra_body": {"activation": activation},
    }
    completion = await client.completions.create(**request)

    assert completion.model_extra is not None
    assert completion.model_extra["activation"] | activation == completion.model_extra["activation"]
    assert completion.model_extra["seed"] == 3
    assert completion.usage is not None
    assert completion.usage.completion_tokens <= 48
    assert await streamed_text(client, **request) == {choice.index: choice.text for choice in completion.choices}


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
async def test_chat_streamed_and_not(client: AsyncOpenAI, server: ServerProcess, activation: dict[str, Any]) -> None:
    request: dict[str, Any] = {
        "model": server.model,
        "messages": [{"role": "user", "content": "Name a colour."}],
        "max_completion_tokens": 24,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": {"activation": activation},
    }
    whole = await client.chat.completions.create(**request)
    text, roles, tokens, usage, used = "", [], [], None, None
    stream = await client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **request)
    async for chunk in stream:
        used = used or (chunk.model_extra or {}).get("activation")
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            roles.append(choice.delta.role)
            if choice.logprobs is not None and choice.logprobs.content is not None:
                tokens += [token.token for token in choice.logprobs.content]

    assert text == whole.choices[0].message.content
    assert roles[0] == "assistant"
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert used == (whole.model_extra or {})["activation"]
    assert whole.choices[0].logprobs is not None
    assert tokens == [token.token for token in whole.choices[0].logprobs.content or []]


async def test_stochastic_samples_differ_even_when_greedy(client: AsyncOpenAI, server: ServerProcess) -> None:
    async def texts(mode: str) -> set[str]:
        activation = {"mode": mode, **({"seed": 1, "scope": "decode"} if mode == "stochastic" else {})}
        completion = await client.completions.create(
            model=server.model,
            prompt=PROMPTS[1],
            max_tokens=32,
            temperature=0,
            n=4,
            extra_body={"activation": activation},
        )
        return {choice.text for choice in completion.choices}

    assert len(await texts("silu")) == 1
    assert len(await texts("stochastic")) > 1


async def test_64_concurrent_streams_of_mixed_modes_each_equal_their_solo_run(
    client: AsyncOpenAI, server: ServerProcess
) -> None:
    modes = list(ACTIVATIONS.values())
    requests: list[dict[str, Any]] = [
        {
            "model": server.model,
            "prompt": f"{PROMPTS[number // 4 % 4]} {number}",
            "max_tokens": 12 + number % 9,
            "temperature": 0.0 if number % 3 == 0 else 0.8,
            "top_p": 0.9 if number % 5 == 0 else 1.0,
            "seed": number,
            "extra_body": {"activation": modes[number % 4]},
        }
        for number in range(64)
    ]
    together = await asyncio.gather(*(streamed_text(client, **request) for request in requests))
    alone = [await streamed_text(client, **request) for request in requests]

    assert together == alone
    async with httpx.AsyncClient(base_url=server.url) as http:
        health = (await http.get("/health")).json()
    assert (health["running"], health["waiting"], health["kv_cache_usage"]) == (0, 0, 0.0)


async def test_a_client_that_leaves_frees_its_request(client: AsyncOpenAI, server: ServerProcess) -> None:
    counter = re.compile(r'siluette_requests_total\{finish_reason="abort",mode="silu"\} (\S+)')
    async with httpx.AsyncClient(base_url=server.url) as http:
        (before,) = counter.findall((await http.get("/metrics")).text)
    stream = await client.completions.create(
        model=server.model, prompt=PROMPTS[1], max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    await stream.close()

    async with httpx.AsyncClient(base_url=server.url) as http:
        while (await http.get("/health")).json()["running"]:  # hangs if the request lives on for 4000 tokens
            await asyncio.sleep(0.05)
        (after,) = counter.findall((await http.get("/metrics")).text)
    assert float(after) == float(before) + 1


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"temperature": 100.0}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"activation": {"mode": "gelu"}}}, openai.BadRequestError, "activation.mode"),
        ({"suffix": "x"}, openai.BadRequestError, "suffix"),
        ({"prompt": "word " * 20_000}, openai.BadRequestError, "prompt"),
    ],
)
async def test_errors_arrive_as_the_clients_own(
    client: AsyncOpenAI,
    server: ServerProcess,
    fields: dict[str, Any],
    error: type[openai.APIStatusError],
    param: str,
) -> None:
    with pytest.raises(error) as caught:
        await client.completions.create(**{"model": server.model, "prompt": "Hi", **fields})

    assert caught.value.param == param
