"""The real application over a real engine, on a tiny random model."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from engine import AsyncEngine, DType, EngineConfig
from server.app import create_app
from server.settings import ServerSettings
from tests.engine.models.tiny import make_tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model folder: context of 256 tokens, vocabulary of 320, untuned."""
    path = tmp_path_factory.mktemp("tiny-model")
    make_tiny("llama", path)
    return path


def tiny_config(model: Path, **overrides: object) -> EngineConfig:
    settings = {"dtype": DType.FLOAT32, "kv_cache_mib": 4, "threads": 1, "allow_untuned_activations": True, **overrides}
    return EngineConfig(model=str(model), **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(tiny_config(tiny_model))
    engine.start()
    yield engine
    engine.shutdown()


@pytest.fixture
def app(engine: AsyncEngine) -> FastAPI:
    return create_app(engine, ServerSettings(served_model_name="tiny", max_body_bytes=64 * 1024, max_prompts=8))


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None)
