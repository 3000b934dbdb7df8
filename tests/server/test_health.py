"""Probes, version and the redirect to the documentation."""

import httpx
import pytest

from engine import AsyncEngine


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
async def test_probes_of_a_healthy_server(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)

    assert response.status_code == 200
    assert response.json() == {"status": "ok"}


async def test_health_shows_the_load(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    health = (await client.get("/health")).json()

    assert health["status"] == "ok"
    assert health["model"] == "tiny"
    assert 0 <= health["kv_cache_usage"] <= 1
    assert health["running"] >= 0
    assert health["waiting"] >= 0


async def test_version(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json()["version"]


async def test_root_leads_to_the_documentation(client: httpx.AsyncClient) -> None:
    response = await client.get("/", follow_redirects=True)

    assert response.status_code == 200
    assert response.url.path == "/docs"
