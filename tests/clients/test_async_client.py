"""`AsyncClient` against a real server."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from siluette_client import Activation, ActivationLike, AsyncClient, BadRequest, RequestTimeout
from tests.clients.conftest import PROMPT, Metrics, byte_by_byte, relay_to
from tests.e2e.conftest import ServerProcess

pytestmark = pytest.mark.slow


@pytest.fixture
async def client(server: ServerProcess) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.url, timeout=None) as client:
        yield client


async def until(metrics: Metrics, running: int, aborted: float) -> None:
    await asyncio.to_thread(metrics.wait_until, lambda now: now.running == running and now.aborted == aborted)


async def test_generate_chat_and_stream_agree(client: AsyncClient) -> None:
    options: dict[str, Any] = {"activation": Activation.stochastic(0.8), "seed": 3, "max_tokens": 8, "n": 2}
    whole = await client.generate(PROMPT, **options)
    answered = await client.chat("Name a colour.", **options)
    texts = {0: "", 1: ""}
    async with client.stream(PROMPT, **options) as stream:
        async for chunk in stream:
            texts[chunk.index] += chunk.text

    assert list(texts.values()) == whole.texts == stream.completion.texts
    assert stream.completion.activation == whole.activation
    assert stream.completion.usage is not None
    assert stream.completion.usage.completion_tokens == 16
    assert (await client.stream(messages="Name a colour.", **options).read()).texts == answered.texts


async def test_compare_keeps_the_order(client: AsyncClient) -> None:
    activations: list[ActivationLike] = ["relu", Activation.stochastic(0.6, seed=5), "silu"]
    answers = await client.compare(messages="Name a colour.", activations=activations, max_tokens=8)

    assert [answer.activation.mode for answer in answers] == ["relu", "stochastic", "silu"]
    assert len({answer.seed for answer in answers}) == 1


async def test_a_comparison_that_fails_gives_up_the_others(client: AsyncClient, metrics: Metrics) -> None:
    before = metrics.aborted
    long: dict[str, Any] = {"max_tokens": 4000, "ignore_eos": True}
    with pytest.raises(BadRequest, match=r"activation\.p"):
        await client.compare(PROMPT, activations=["silu", Activation.stochastic(1.5), "relu"], **long)

    await asyncio.to_thread(metrics.wait_until, lambda now: now.running == 0 and now.waiting == 0)
    assert metrics.aborted >= before  # a request that was given up before it was sent is none


async def test_models_and_sparsity(client: AsyncClient, server: ServerProcess) -> None:
    assert [model.id for model in await client.models()] == [server.model]
    await client.generate(PROMPT, activation="relu", max_tokens=4)
    ratio = (await client.sparsity())["relu"].ratio
    assert ratio is not None
    assert 0.5 < ratio < 1


async def test_time_out_of_one_call(client: AsyncClient, metrics: Metrics) -> None:
    aborted = metrics.aborted
    with pytest.raises(RequestTimeout):
        await client.generate(PROMPT, max_tokens=4000, ignore_eos=True, timeout=0.5)

    await until(metrics, running=0, aborted=aborted + 1)


async def test_leaving_a_stream_frees_the_request(client: AsyncClient, metrics: Metrics) -> None:
    aborted = metrics.aborted
    async with client.stream(PROMPT, max_tokens=4000, ignore_eos=True) as stream:
        async for _ in stream:
            break
        assert metrics.running == 1

    await until(metrics, running=0, aborted=aborted + 1)


@pytest.mark.parametrize("method", ["generate", "chat", "stream", "compare"])
async def test_cancelling_the_task_frees_the_request(client: AsyncClient, metrics: Metrics, method: str) -> None:
    aborted = metrics.aborted
    long: dict[str, Any] = {"max_tokens": 4000, "ignore_eos": True}
    requests = {
        "generate": lambda: client.generate(PROMPT, **long),
        "chat": lambda: client.chat("Tell me a story.", **long),
        "stream": lambda: client.stream(PROMPT, **long).read(),
        "compare": lambda: client.compare(PROMPT, activations=["silu", "relu"], **long),
    }
    running = 2 if method == "compare" else 1
    task = asyncio.create_task(requests[method]())
    await until(metrics, running=running, aborted=aborted)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    await until(metrics, running=0, aborted=aborted + running)
    assert (await client.generate(PROMPT, max_tokens=1)).text


async def test_a_stream_that_arrives_byte_by_byte_is_the_same(client: AsyncClient, server: ServerProcess) -> None:
    options: dict[str, Any] = {
        "seed": 5, "activation": Activation.stochastic(0.6), "max_tokens": 4, "echo": True,
    }  # fmt: skip
    prompt = "Grüße, 日本語 🎉"
    at_once = [chunk async for chunk in client.stream(prompt, **options)]
    async with (
        relay_to(server.url, byte_by_byte) as relay,
        AsyncClient(relay.url, timeout=None) as slow,
        slow.stream(prompt, **options) as stream,
    ):
        chunks = [chunk async for chunk in stream]

    assert chunks == at_once
    assert stream.completion.text.startswith(prompt)
