"""`Client` against a real server."""

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from siluette_client import (
    Activation,
    ActivationLike,
    BadRequest,
    Client,
    Completion,
    ContextLengthExceeded,
    InvalidAnswer,
    NotFound,
    RequestTimeout,
)
from tests.clients.conftest import PROMPT, Metrics
from tests.e2e.conftest import ServerProcess

pytestmark = pytest.mark.slow

ACTIVATIONS: dict[str, ActivationLike] = {
    "silu": "silu",
    "stochastic": Activation.stochastic(0.8, seed=11),
    "stochastic-decode": Activation.stochastic(0.8, seed=11, scope="decode"),
    "relu": Activation.relu(),
}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url, timeout=None) as client:
        yield client


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_the_answer_says_what_was_used_and_sending_that_back_gives_the_same_text(
    client: Client, activation: ActivationLike
) -> None:
    first = client.generate(PROMPT, activation=activation, max_tokens=12, n=2)
    again = client.generate(PROMPT, activation=first.activation, seed=first.seed, max_tokens=12, n=2)

    assert len(first.texts) == 2
    assert all(first.texts)
    assert first.usage is not None
    assert first.usage.completion_tokens == 24
    assert again.texts == first.texts
    assert (again.activation, again.seed) == (first.activation, first.seed)


def test_the_activation_seed_that_the_server_drew_is_reported(client: Client) -> None:
    answer = client.generate(PROMPT, activation=Activation.stochastic(0.7), max_tokens=1)

    assert (answer.activation.mode, answer.activation.p, answer.activation.scope) == ("stochastic", 0.7, "all")
    assert isinstance(answer.activation.seed, int)
    assert isinstance(answer.seed, int)


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("endpoint", ["generate", "chat"])
def test_a_stream_put_together_is_the_whole_answer(client: Client, endpoint: str, activation: ActivationLike) -> None:
    options: dict[str, Any] = {"activation": activation, "seed": 3, "max_tokens": 10, "n": 2, "logprobs": 2}
    if endpoint == "generate":
        whole, stream = client.generate(PROMPT, **options), client.stream(PROMPT, **options)
    else:
        whole, stream = client.chat("Name a colour.", **options), client.stream(messages="Name a colour.", **options)
    texts = {0: "", 1: ""}
    with stream:
        for chunk in stream:
            texts[chunk.index] += chunk.text

    assert list(texts.values()) == whole.texts
    assert without_id(stream.completion) == without_id(whole)
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs) == 10
    assert len(whole.choices[0].logprobs[0].top_logprobs) >= 2


def without_id(answer: Completion) -> dict[str, Any]:
    """What two runs of one request have in common; the second one finds its prompt in the cache."""
    return answer.model_dump(
        exclude={"id": True, "created": True, "object": True, "usage": {"prompt_tokens_details": True}}
    )


def test_conversations_have_roles(client: Client) -> None:
    answer = client.chat(
        [
            {"role": "system", "content": "You answer with one word."},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        temperature=0,
        max_tokens=8,
    )

    assert "Paris" in answer.text


def test_several_prompts_have_their_samples_in_order(client: Client) -> None:
    answer = client.generate(["Red,", "One, two, three,"], n=2, echo=True, max_tokens=2, temperature=0)

    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [text.split(",")[0] for text in answer.texts] == ["Red", "Red", "One", "One"]


def test_compare_differs_in_the_activation_alone(client: Client) -> None:
    activations: list[ActivationLike] = ["relu", "silu", Activation.stochastic(0.6, seed=5), "silu"]
    answers = client.compare(PROMPT, activations=activations, max_tokens=12, ignore_eos=True)

    assert [answer.activation.mode for answer in answers] == ["relu", "silu", "stochastic", "silu"]
    assert answers[2].activation.seed == 5
    assert len({answer.seed for answer in answers}) == 1
    assert answers[1].text == answers[3].text
    assert len({answer.text for answer in answers}) == 3
    assert all(answer.usage is not None and answer.usage.completion_tokens == 12 for answer in answers)
    alone = [
        client.generate(PROMPT, activation=item, seed=answers[0].seed, max_tokens=12, ignore_eos=True)
        for item in activations
    ]
    assert [answer.text for answer in answers] == [answer.text for answer in alone]


def test_compare_runs_concurrently(client: Client, metrics: Metrics) -> None:
    comparison = threading.Thread(
        target=client.compare,
        kwargs={"messages": "Tell me a story.", "activations": ["silu", "relu", "stochastic"], "max_tokens": 150}
        | {"ignore_eos": True},
    )
    comparison.start()
    metrics.wait_until(lambda now: now.running == 3)
    comparison.join()


def test_a_comparison_that_fails_gives_up_the_others(client: Client, metrics: Metrics) -> None:
    aborted = metrics.aborted
    with pytest.raises(BadRequest) as caught:
        client.compare(
            PROMPT, activations=["silu", Activation.stochastic(1.5), "relu"], max_tokens=4000, ignore_eos=True
        )

    assert caught.value.param == "activation.p"
    metrics.wait_until(lambda now: now.running == 0 and now.aborted == aborted + 2)


def test_models_say_which_activations_they_support(client: Client, server: ServerProcess) -> None:
    (model,) = client.models()

    assert model.id == server.model
    assert model.max_model_len > 0
    assert set(model.activations.modes) == {"silu", "stochastic", "relu"}
    assert model.activations.tuned
    assert model.activations.sparsity is not None
    assert 0.5 < model.activations.sparsity < 1


def test_an_answer_has_its_own_sparsity(client: Client) -> None:
    activations = ["silu", Activation.stochastic(0.8, seed=1), "relu"]
    silu, stochastic, relu = (
        answer.sparsity or 0 for answer in client.compare(PROMPT, activations=activations, max_tokens=8)
    )

    assert silu == 0
    assert 0.5 < relu < 1
    assert 0.2 * 0.5 < stochastic < 0.2  # of the negative values, every fifth
    with client.stream(PROMPT, activation="relu", max_tokens=8, n=2, seed=3) as stream:
        chunks = list(stream)
    assert {chunk.index: chunk.sparsity for chunk in chunks if chunk.sparsity is not None} == {
        choice.index: choice.sparsity for choice in stream.completion.choices
    }
    whole = client.generate(PROMPT, activation="relu", max_tokens=8, n=2, seed=3)
    assert [choice.sparsity for choice in stream.completion.choices] == [choice.sparsity for choice in whole.choices]


def test_sparsity_of_what_ran_between_two_readings(client: Client) -> None:
    before = client.sparsity()
    client.generate(PROMPT, activation="relu", max_tokens=8)
    client.generate(PROMPT, activation="silu", max_tokens=8)
    after = client.sparsity()

    relu, silu = (after[mode].since(before[mode]) for mode in ("relu", "silu"))
    assert relu.ratio is not None
    assert 0.5 < relu.ratio < 1
    assert silu.ratio == 0
    assert list(relu.by_layers)[::14] == ["00-01", "28-29"]  # 30 layers, two by two
    assert after["stochastic"].since(before["stochastic"]).ratio is None


@pytest.mark.parametrize(
    ("options", "error", "param", "code"),
    [
        ({"temperature": 100}, BadRequest, "temperature", "invalid_value"),
        ({"activation": Activation(mode="gelu")}, BadRequest, "activation.mode", "invalid_value"),
        ({"activation": Activation.stochastic(1.5)}, BadRequest, "activation.p", "invalid_value"),
        ({"model": "gpt-4"}, NotFound, "model", "model_not_found"),
        ({"extra_body": {"tools": []}}, BadRequest, "tools", "unsupported_field"),
        ({"prompt": "word " * 20_000}, ContextLengthExceeded, "prompt", "context_length_exceeded"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_errors_carry_status_field_code_and_message(
    client: Client, streamed: bool, options: dict[str, Any], error: type[BadRequest], param: str, code: str
) -> None:
    options = {"prompt": PROMPT, **options}
    with pytest.raises(error) as caught:
        client.stream(**options).read() if streamed else client.generate(**options)

    assert caught.value.status == (404 if error is NotFound else 400)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.message in str(caught.value)


def test_time_out_of_one_call(client: Client, metrics: Metrics) -> None:
    aborted = metrics.aborted
    with pytest.raises(RequestTimeout):
        client.generate(PROMPT, max_tokens=4000, ignore_eos=True, timeout=0.5)

    metrics.wait_until(lambda now: now.running == 0 and now.aborted == aborted + 1)
    assert client.generate(PROMPT, max_tokens=1).text


def test_closing_a_stream_frees_the_request(client: Client, metrics: Metrics) -> None:
    aborted = metrics.aborted
    with client.stream(PROMPT, max_tokens=4000, ignore_eos=True) as stream:
        first = next(stream)
        assert metrics.running == 1

    assert list(stream) == []
    assert stream.completion.text.startswith(first.text)
    assert stream.completion.choices[0].finish_reason is None
    metrics.wait_until(lambda now: now.running == 0 and now.aborted == aborted + 1)


def test_a_stream_is_an_iterator_without_a_block_too(client: Client, metrics: Metrics) -> None:
    stream = client.stream(PROMPT, max_tokens=6, activation="relu")
    text = "".join(chunk.text for chunk in stream)

    assert text == stream.completion.text
    assert stream.completion.usage is not None
    assert stream.completion.usage.completion_tokens == 6


def test_connections_are_used_again_also_after_a_stream(server: ServerProcess) -> None:
    ports = set()
    with Client(server.url, timeout=None) as client:
        for _ in range(3):
            client.stream(PROMPT, max_tokens=2).read()
            client.generate(PROMPT, max_tokens=1)
            pool = client._http._transport._pool  # type: ignore[attr-defined]
            ports |= {id(connection) for connection in pool.connections}

    assert len(ports) == 1


def test_address_from_the_environment_with_or_without_v1(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in (server.url, f"{server.url}/", f"{server.url}/v1"):
        monkeypatch.setenv("SILUETTE_BASE_URL", url)
        with Client(timeout=None) as client:
            assert client.base_url == server.url
            assert client.models()[0].id == server.model


def test_an_own_http_client_is_used_and_left_open(server: ServerProcess) -> None:
    with httpx.Client() as http:
        with Client(server.url, http_client=http, timeout=None) as client:
            client.models()
        assert not http.is_closed


def test_another_kind_of_server_is_named(server: ServerProcess) -> None:
    with Client(f"{server.url}/docs#".removesuffix("#"), timeout=None) as client, pytest.raises(NotFound):
        client.models()
    with (
        Client(server.url, timeout=None) as client,
        pytest.raises(InvalidAnswer, match="must be of type text/event-stream"),
    ):
        client.stream(PROMPT, max_tokens=1, extra_body={"stream": None, "stream_options": None}).read()
