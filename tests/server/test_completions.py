"""`/v1/completions`, streamed and not."""

from itertools import pairwise
from typing import Any

import httpx
import pytest

from engine import AsyncEngine
from tests.server.helpers import MODES, error_of, events_of, mode_id

REQUEST = {"prompt": "Once upon a time", "max_tokens": 12, "ignore_eos": True, "seed": 5}


async def complete(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={**REQUEST, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    return events_of(await client.post("/v1/completions", json={**REQUEST, "stream": True, **fields}))


def texts(events: list[dict[str, Any]]) -> dict[int, str]:
    joined: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            joined[choice["index"]] = joined.get(choice["index"], "") + choice["text"]
    return joined


def sparsity(events: list[dict[str, Any]]) -> dict[int, list[float]]:
    """Of each choice, what its events say: once, at its end."""
    said: dict[int, list[float]] = {}
    for event in events:
        for choice in event["choices"]:
            assert (choice["sparsity"] is None) == (choice["finish_reason"] is None)
            if choice["sparsity"] is not None:
                said.setdefault(choice["index"], []).append(choice["sparsity"])
    return said


@pytest.mark.parametrize("activation", MODES, ids=mode_id)
async def test_answer_says_what_was_used_and_sending_that_again_gives_the_same_text(
    client: httpx.AsyncClient, activation: dict[str, Any]
) -> None:
    first = await complete(client, activation=activation, seed=None)

    assert first["object"] == "text_completion"
    assert first["model"] == "tiny"
    assert first["activation"] | activation == first["activation"]
    assert isinstance(first["seed"], int)
    assert (first["activation"]["seed"] is not None) == (activation["mode"] == "stochastic")
    again = await complete(client, activation=first["activation"], seed=first["seed"])
    assert again["choices"] == first["choices"]


@pytest.mark.parametrize("activation", MODES, ids=mode_id)
async def test_streamed_text_equals_the_whole_answer(client: httpx.AsyncClient, activation: dict[str, Any]) -> None:
    whole = await complete(client, activation=activation, n=2)
    events = await stream(client, activation=activation, n=2)

    assert texts(events) == {choice["index"]: choice["text"] for choice in whole["choices"]}
    assert events[0]["activation"] == whole["activation"]
    assert events[0]["seed"] == whole["seed"]
    assert len({event["id"] for event in events}) == 1
    assert sparsity(events) == {choice["index"]: [choice["sparsity"]] for choice in whole["choices"]}


async def test_first_event_and_every_last_one_say_what_was_used(client: httpx.AsyncClient) -> None:
    events = await stream(client, n=2)

    last = [event for event in events if event["choices"][0]["finish_reason"] is not None]
    assert len(last) == 2
    assert all("activation" in event and "seed" in event for event in [events[0], *last])
    assert all(event["choices"][0]["finish_reason"] == "length" for event in last)


async def test_usage(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    answer = await complete(client, n=3)

    prompt_tokens = len(engine.tokenizer.encode(str(REQUEST["prompt"])))
    assert answer["usage"].pop("prompt_tokens_details")["cached_tokens"] >= 0
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 36,
        "total_tokens": prompt_tokens + 36,
    }


async def test_cached_tokens_are_reported(client: httpx.AsyncClient) -> None:
    request = {"prompt": list(range(100, 180)), "max_tokens": 1}
    await complete(client, **request)
    answer = await complete(client, **request)

    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64


async def test_streamed_usage_comes_last_and_only_when_asked_for(client: httpx.AsyncClient) -> None:
    whole = await complete(client)
    events = await stream(client, stream_options={"include_usage": True})

    *others, last = events
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert "activation" in last
    assert all(event["usage"] is None for event in others)
    assert all("usage" not in event for event in await stream(client))


async def test_several_prompts_number_their_choices_prompt_by_prompt(client: httpx.AsyncClient) -> None:
    prompts = ["Once upon a time", "The end", "x"]
    answer = await complete(client, prompt=prompts, n=2)

    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    alone = [await complete(client, prompt=prompt, n=2) for prompt in prompts]
    expected = [choice["text"] for single in alone for choice in single["choices"]]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert texts(await stream(client, prompt=prompts, n=2)) == dict(enumerate(expected))
    assert answer["usage"]["prompt_tokens"] == sum(single["usage"]["prompt_tokens"] for single in alone)


async def test_one_drawn_seed_serves_all_prompts(client: httpx.AsyncClient) -> None:
    drawn = await complete(client, prompt=["one", "two"], seed=None, activation={"mode": "stochastic"})

    again = await complete(client, prompt=["one", "two"], seed=drawn["seed"], activation=drawn["activation"])
    assert again["choices"] == drawn["choices"]


async def test_token_ids_and_text_are_the_same_prompt(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    text = await complete(client, prompt="Once upon")
    token_ids = engine.tokenizer.encode("Once upon")

    assert (await complete(client, prompt=token_ids))["choices"] == text["choices"]
    several = await complete(client, prompt=[token_ids, token_ids])
    assert several["choices"][1]["text"] == text["choices"][0]["text"]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_echo_begins_each_choice_with_its_prompt(
    client: httpx.AsyncClient, engine: AsyncEngine, streamed: bool, as_ids: bool
) -> None:
    prompts: list[Any] = ["Ab", "Cd"]
    plain = await complete(client, prompt=prompts, n=2)
    sent = [engine.tokenizer.encode(prompt) for prompt in prompts] if as_ids else prompts
    if streamed:
        echoed = texts(await stream(client, prompt=sent, n=2, echo=True))
    else:
        answer = await complete(client, prompt=sent, n=2, echo=True)
        echoed = {choice["index"]: choice["text"] for choice in answer["choices"]}

    assert echoed == {choice["index"]: prompts[choice["index"] // 2] + choice["text"] for choice in plain["choices"]}


async def test_logprobs_lists_are_parallel(client: httpx.AsyncClient) -> None:
    answer = await complete(client, logprobs=3)

    logprobs = answer["choices"][0]["logprobs"]
    assert {len(values) for values in logprobs.values()} == {12}
    assert all(value <= 0 for value in logprobs["token_logprobs"])
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert 1 <= len(top) <= 4
        assert top[token] >= value  # equal, unless two tokens share a text
    steps = [after - before for before, after in pairwise(logprobs["text_offset"])]
    assert steps == [len(token) for token in logprobs["tokens"][:-1]]


async def test_streamed_logprobs_equal_the_whole_answers(client: httpx.AsyncClient) -> None:
    whole = (await complete(client, logprobs=2))["choices"][0]["logprobs"]
    pieces = [event["choices"][0]["logprobs"] for event in await stream(client, logprobs=2)]

    for name, values in whole.items():
        joined = [value for piece in pieces if piece is not None for value in piece[name]]
        if name == "top_logprobs":
            joined, values = [list(top) for top in joined], [list(top) for top in values]
        assert joined == pytest.approx(values) if name == "token_logprobs" else joined == values


async def test_stop_string_ends_the_text_before_it(client: httpx.AsyncClient) -> None:
    text = (await complete(client, temperature=0, max_tokens=30))["choices"][0]["text"]
    stop = text[5:8]
    answer = await complete(client, temperature=0, max_tokens=30, stop=[stop])

    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_null_is_not_sent(client: httpx.AsyncClient) -> None:
    nulls = dict.fromkeys(["stop", "logprobs", "n", "temperature", "best_of", "user", "logit_bias", "stream_options"])
    request: dict[str, Any] = {**nulls, "activation": {"mode": "silu", "p": None, "seed": None}}

    assert (await complete(client, **request))["choices"] == (await complete(client))["choices"]


async def test_logit_bias_forces_a_token(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    (token_id,) = engine.tokenizer.encode("A")
    answer = await complete(client, logit_bias={str(token_id): 100})

    assert answer["choices"][0]["text"] == "A" * 12


async def test_served_model_name_and_request_id(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={**REQUEST, "model": "tiny", "user": "someone"})

    assert response.status_code == 200
    assert response.headers["x-request-id"] == response.json()["id"]


async def test_too_many_prompts(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post("/v1/completions", json={"prompt": ["x"] * 9}), 400)

    assert error["param"] == "prompt"
    assert "at most 8" in error["message"]
