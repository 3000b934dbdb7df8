"""`/v1/models`."""

import httpx

from engine import AsyncEngine
from tests.server.helpers import error_of


async def test_the_served_model_is_listed_with_its_activations(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    models = (await client.get("/v1/models")).json()

    assert models["object"] == "list"
    (card,) = models["data"]
    assert (card["id"], card["object"]) == ("tiny", "model")
    assert card["max_model_len"] == engine.info.max_model_len
    assert card["activations"]["modes"] == list(engine.info.support.modes)
    assert (await client.get("/v1/models/tiny")).json() == card


async def test_names_may_hold_slashes(client: httpx.AsyncClient) -> None:
    error = error_of(await client.get("/v1/models/someone/some-model"), 404)

    assert error["code"] == "model_not_found"
    assert "'someone/some-model'" in error["message"]
