"""`/v1/models`."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engine import AsyncEngine, Quantization
from server.app import create_app
from server.settings import ServerSettings
from tests.server.conftest import client_of, tiny_config
from tests.server.helpers import error_of


async def test_the_served_model_is_listed_with_its_activations(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    models = (await client.get("/v1/models")).json()

    assert models["object"] == "list"
    (card,) = models["data"]
    assert (card["id"], card["object"]) == ("tiny", "model")
    for field in ("max_model_len", "dtype", "quantization", "weight_bytes"):
        assert card[field] == getattr(engine.info, field)
    assert card["activations"]["modes"] == list(engine.info.support.modes)
    assert (await client.get("/v1/models/tiny")).json() == card


async def test_a_quantised_model_says_so_and_has_a_fingerprint_of_its_own(tiny_model: Path) -> None:
    settings = ServerSettings()
    cards, fingerprints = [], []
    for quantize in Quantization:
        engine = AsyncEngine(tiny_config(tiny_model, quantize=quantize))
        app = create_app(engine, settings)
        fingerprints.append(app.state.services.fingerprint)
        async with client_of(app) as client:
            cards.append((await client.get("/v1/models")).json()["data"][0])
            metrics = (await client.get("/metrics")).text
        engine.shutdown()
        assert f'quantization="{quantize}"' in metrics

    assert [card["quantization"] for card in cards] == [*Quantization]
    assert len({card["weight_bytes"] for card in cards}) == len(set(fingerprints)) == len(Quantization)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"threads": 2}, True),
        ({"ffn_path": "sparse"}, True),
        ({"kernels": "reference"}, False),
        ({"dtype": "bfloat16"}, False),
    ],
)
def test_a_fingerprint_names_what_seeded_texts_depend_on(
    tiny_model: Path, app: FastAPI, options: dict[str, Any], same: bool
) -> None:
    engine = AsyncEngine(tiny_config(tiny_model, **options))
    other = create_app(engine, ServerSettings())
    engine.shutdown()

    assert (other.state.services.fingerprint == app.state.services.fingerprint) is same


async def test_names_may_hold_slashes(client: httpx.AsyncClient) -> None:
    error = error_of(await client.get("/v1/models/someone/some-model"), 404)

    assert error["code"] == "model_not_found"
    assert "'someone/some-model'" in error["message"]
