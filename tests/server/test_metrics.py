"""`/metrics`: what is counted, and that labels cannot grow with the input."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from engine import Activation, ActivationMode, AsyncEngine, FinishReason, RequestOutput, SampleOutput
from engine.step_clock import StepPhase
from server.app import create_app
from server.metrics import ServerMetrics
from server.metrics_engine import layer_groups
from server.settings import ServerSettings
from tests.server.conftest import client_of, tiny_config
from tests.server.helpers import MODES, mode_id


async def scrape(client: httpx.AsyncClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    response = await client.get("/metrics")
    assert response.status_code == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


@pytest.mark.parametrize("activation", MODES, ids=mode_id)
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_request_is_counted(client: httpx.AsyncClient, activation: dict[str, Any], streamed: bool) -> None:
    before = await scrape(client)
    request = {"prompt": "Hi", "max_tokens": 5, "n": 2, "ignore_eos": True, "stream": streamed}
    await client.post("/v1/completions", json={**request, "activation": activation})
    after = await scrape(client)

    mode = activation["mode"]

    def grown(name: str, **labels: str) -> float:
        return after[key(name, **labels)] - before[key(name, **labels)]

    assert grown("siluette_requests_total", mode=mode, finish_reason="length") == 1
    assert grown("siluette_requests_total", mode=mode, finish_reason="abort") == 0
    assert grown("siluette_generation_tokens_total", mode=mode) == 10
    assert grown("siluette_time_to_first_token_seconds_count", mode=mode) == 1
    assert grown("siluette_inter_token_latency_seconds_count", mode=mode) <= 8  # fewer if tokens came together
    assert grown("siluette_e2e_request_latency_seconds_count", mode=mode) == 1
    assert (
        grown("siluette_prompt_tokens_total", mode=mode) == grown("siluette_request_prompt_tokens_sum", mode=mode) > 0
    )
    assert grown("siluette_request_generation_tokens_sum", mode=mode) == 10
    assert grown("siluette_engine_steps_total") >= 5


async def test_the_times_of_a_request_add_up(client: httpx.AsyncClient) -> None:
    before = await scrape(client)
    await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 5, "ignore_eos": True})
    after = await scrape(client)

    def seconds(name: str) -> float:
        return after[key(f"siluette_{name}_sum", mode="silu")] - before[key(f"siluette_{name}_sum", mode="silu")]

    queue, prefill, decode = (seconds(f"request_{part}_time_seconds") for part in ("queue", "prefill", "decode"))
    assert min(queue, prefill, decode) > 0
    assert queue + prefill == pytest.approx(seconds("time_to_first_token_seconds"))
    assert queue + prefill + decode == pytest.approx(seconds("e2e_request_latency_seconds"))


async def test_a_request_that_waits_has_a_queue_time(tiny_model: Path) -> None:
    """One place in the batch: the second of two requests waits for the first."""
    engine = AsyncEngine(tiny_config(tiny_model, max_num_seqs=1))
    app = create_app(engine, ServerSettings())
    async with app.router.lifespan_context(app), client_of(app) as client:
        request = {"prompt": "Hi", "max_tokens": 100, "ignore_eos": True}
        await asyncio.gather(*(client.post("/v1/completions", json=request) for _ in range(2)))
        metrics = await scrape(client)

    queue = metrics[key("siluette_request_queue_time_seconds_sum", mode="silu")]
    decode = metrics[key("siluette_request_decode_time_seconds_sum", mode="silu")]
    assert queue > decode / 4  # of both, where one would be decode / 2


async def test_phases_of_steps_add_up_to_the_steps(client: httpx.AsyncClient) -> None:
    before = await scrape(client)
    await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 50, "ignore_eos": True})
    after = await scrape(client)

    phases = {
        dict(labels)["phase"]: value - before[name, labels]
        for (name, labels), value in after.items()
        if name == "siluette_engine_phase_seconds_total"
    }
    assert set(phases) == set(StepPhase)
    assert all(seconds > 0 for seconds in phases.values())
    total = key("siluette_engine_step_seconds_total")
    assert sum(phases.values()) == pytest.approx(after[total] - before[total], rel=0.1)


@pytest.mark.parametrize(("p", "tolerance"), [(0.0, 0.0), (0.3, 0.03), (0.8, 0.03), (1.0, 0.03)])
async def test_p_is_drawn_as_asked_for(client: httpx.AsyncClient, p: float, tolerance: float) -> None:
    before = await scrape(client)
    activation = {"mode": "stochastic", "p": p, "seed": 5}
    await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 60, "activation": activation})
    after = await scrape(client)

    negatives, kept, expected = (
        after[key(f"siluette_stochastic_{name}_total")] - before[key(f"siluette_stochastic_{name}_total")]
        for name in ("negatives", "silu", "silu_expected")
    )
    assert negatives > 1000
    assert expected == pytest.approx(p * negatives)
    assert kept / negatives == pytest.approx(p, abs=tolerance)


def test_every_token_after_a_samples_first_is_an_inter_token_latency(engine: AsyncEngine) -> None:
    metrics = ServerMetrics(engine)
    observer = metrics.observe_prompt(ActivationMode.SILU, prompt_tokens=3)
    for moved in ([(0, 1)], [(0, 1), (1, 1)], [(0, 0), (1, 3)], [(0, 2)]):
        pieces = [SampleOutput(index, token_ids=[7] * count) for index, count in moved]
        observer.piece(RequestOutput("id", 3, 0, Activation(), 1, pieces))

    assert metrics.generation_tokens[ActivationMode.SILU] == 1 + 2 + 3 + 2
    samples = metrics.inter_token.collect().samples
    counts = {sample.labels["mode"]: sample.value for sample in samples if sample.name.endswith("_count")}
    assert counts["silu"] == 1 + 3 + 2
    assert counts["relu"] == 0
    text = generate_latest(metrics.registry).decode()
    assert 'siluette_time_to_first_token_seconds_count{mode="silu"} 1.0' in text


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        ([FinishReason.STOP, FinishReason.STOP], "stop"),
        ([FinishReason.STOP, FinishReason.LENGTH], "length"),
        ([FinishReason.ERROR, FinishReason.LENGTH], "error"),
    ],
)
def test_the_worst_reason_of_several_samples_counts(engine: AsyncEngine, ends: list[FinishReason], reason: str) -> None:
    metrics = ServerMetrics(engine)
    observer = metrics.observe_prompt(ActivationMode.SILU, prompt_tokens=3)
    pieces = [SampleOutput(index, token_ids=[7], finish_reason=end) for index, end in enumerate(ends)]
    observer.piece(RequestOutput("id", 3, 0, Activation(), 1, pieces, finished=True))
    observer.finished()

    text = generate_latest(metrics.registry).decode()
    assert f'siluette_requests_total{{finish_reason="{reason}",mode="silu"}} 1.0' in text


async def test_relu_leaves_zeros_in_every_layer(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 5, "activation": {"mode": "relu"}})
    metrics = await scrape(client)

    for layers in layer_groups(engine.info.num_layers):
        zeros = metrics[key("siluette_ffn_zeros_total", mode="relu", layers=layers)]
        elements = metrics[key("siluette_ffn_elements_total", mode="relu", layers=layers)]
        assert 0.2 < zeros / elements < 0.8  # a random model: about half of its gate values are negative
    assert 0.2 < metrics[key("siluette_ffn_sparsity_ratio", mode="relu")] < 0.8
    assert sum(value for (name, _), value in metrics.items() if name == "siluette_ffn_rows_total") > 0


async def test_engine_gauges(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    metrics = await scrape(client)

    assert metrics[key("siluette_engine_up")] == 1
    assert metrics[key("siluette_kv_blocks")] == engine.info.num_kv_blocks
    assert 0 <= metrics[key("siluette_kv_cache_usage_ratio")] <= 1
    assert metrics[key("siluette_requests_running")] >= 0


async def test_http_requests_are_counted_by_template_not_by_path(client: httpx.AsyncClient) -> None:
    for number in range(20):
        await client.get(f"/scan/{number}")
        await client.get(f"/v1/models/{number}")
        await client.request(f"METHOD{number}", "/x")
    metrics = await scrape(client)

    counted = {labels: value for (name, labels), value in metrics.items() if name == "siluette_http_requests_total"}
    assert counted[frozenset({("route", "unmatched"), ("method", "GET"), ("status", "404")})] == 20
    assert counted[frozenset({("route", "unmatched"), ("method", "other"), ("status", "404")})] == 20
    assert counted[frozenset({("route", "/v1/models/{model:path}"), ("method", "GET"), ("status", "404")})] == 20
    assert len(counted) == 3


async def test_no_label_holds_what_a_client_sent(client: httpx.AsyncClient, app: FastAPI) -> None:
    request = {"prompt": "Hi", "max_tokens": 1, "user": "mallory", "activation": {"mode": "stochastic", "p": 0.777}}
    await client.post("/v1/completions", json=request)
    text = (await client.get("/metrics")).text

    assert "mallory" not in text
    assert "0.777" not in text


async def test_unexpected_failures_are_counted(app: FastAPI) -> None:
    @app.get("/broken")
    async def broken() -> None:
        raise KeyError("nobody expects this")

    async with client_of(app) as client:
        assert (await client.get("/broken")).status_code == 500
        text = (await client.get("/metrics")).text

    assert 'siluette_http_requests_total{method="GET",route="/broken",status="500"} 1.0' in text
