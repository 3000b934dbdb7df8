"""The table from exceptions to answers."""

import json

import httpx
import pytest
from fastapi import FastAPI

from engine import (
    ContextLengthExceeded,
    EngineError,
    EngineOverloaded,
    EngineStopped,
    InvalidRequest,
    ModelLoadError,
    UntunedActivation,
)
from server.errors import ModelNotFound, error_body, error_kind, error_response, install_handlers
from tests.server.conftest import client_of
from tests.server.helpers import error_of


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidRequest("bad", "n"), 400, "invalid_value"),
        (ContextLengthExceeded("long", "prompt"), 400, "context_length_exceeded"),
        (UntunedActivation("untuned", "activation.mode"), 400, "untuned_activation"),
        (ModelNotFound("x", "y"), 404, "model_not_found"),
        (EngineOverloaded("full", 2.0), 429, "engine_overloaded"),
        (EngineStopped("dead"), 503, "engine_stopped"),
        (ModelLoadError("secret path"), 500, "internal_error"),
        (EngineError("secret"), 500, "internal_error"),
        (ZeroDivisionError("secret"), 500, "internal_error"),
    ],
)
def test_every_class_has_its_status_and_code(error: Exception, status: int, code: str) -> None:
    assert (error_kind(error).status, error_kind(error).code) == (status, code)


def test_a_subclass_without_an_entry_is_reported_as_its_parent() -> None:
    class TooShort(InvalidRequest):
        pass

    assert error_kind(TooShort("x")) == error_kind(InvalidRequest("x"))


def test_internal_errors_keep_their_text_to_the_log() -> None:
    assert "secret" not in json.dumps(error_body(RuntimeError("secret")))


@pytest.mark.parametrize(("hint", "header"), [(0.2, "1"), (1.0, "1"), (7.2, "8")])
def test_overload_says_when_to_try_again_in_whole_seconds(hint: float, header: str) -> None:
    assert error_response(EngineOverloaded("full", hint)).headers["retry-after"] == header


async def test_handlers_catch_what_routes_raise() -> None:
    app = FastAPI()
    install_handlers(app)
    errors: dict[str, Exception] = {
        "overload": EngineOverloaded("full"),
        "stopped": EngineStopped("dead"),
        "bug": ZeroDivisionError("secret"),
        "engine-bug": EngineError("secret"),
    }

    @app.get("/{name}")
    async def fail(name: str) -> None:
        raise errors[name]

    async with client_of(app) as client:

        async def status(name: str, expected: int) -> httpx.Response:
            response = await client.get(f"/{name}")
            error_of(response, expected)
            return response

        assert "retry-after" in (await status("overload", 429)).headers
        await status("stopped", 503)
        assert "secret" not in (await status("bug", 500)).text
        assert "secret" not in (await status("engine-bug", 500)).text
