"""The application as a whole: its OpenAPI page, and browsers of other origins."""

from typing import Any

import httpx
import pytest

from engine import AsyncEngine
from server.app import create_app
from server.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from server.settings import ServerSettings
from tests.server.conftest import client_of

ENDPOINTS: dict[str, type[GenerationRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}


@pytest.fixture
async def openapi(client: httpx.AsyncClient) -> dict[str, Any]:
    schema: dict[str, Any] = (await client.get("/openapi.json")).json()
    return schema


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_examples_cover_the_modes_and_work(client: httpx.AsyncClient, openapi: dict[str, Any], path: str) -> None:
    examples = openapi["paths"][path]["post"]["requestBody"]["content"]["application/json"]["examples"]

    assert list(examples) == ["silu", "stochastic", "relu"]
    for example in examples.values():
        response = await client.post(path, json=example["value"])
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("path", ENDPOINTS)
def test_errors_are_documented_with_their_real_body(openapi: dict[str, Any], path: str) -> None:
    responses = openapi["paths"][path]["post"]["responses"]

    assert {"200", "400", "404", "413", "429", "503"} <= set(responses)
    assert "422" not in responses
    for status in ("400", "404", "413", "429", "503"):
        assert responses[status]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse")


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_field_is_described(openapi: dict[str, Any], path: str) -> None:
    fields = openapi["components"]["schemas"][ENDPOINTS[path].__name__]["properties"]

    assert set(fields) == set(ENDPOINTS[path].model_fields)
    assert [name for name, field in fields.items() if not field.get("description")] == []


async def test_browsers_of_other_origins_are_let_in_only_if_listed(engine: AsyncEngine) -> None:
    headers = {"origin": "https://example.org"}
    for origins, allowed in (([], None), (["https://example.org"], "https://example.org")):
        async with client_of(create_app(engine, ServerSettings(cors_origins=origins))) as client:
            response = await client.get("/version", headers=headers)
        assert response.headers.get("access-control-allow-origin") == allowed
