"""From exceptions to HTTP answers: one table, one body, the handlers that use them.

Every error answer, whatever went wrong, has OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from engine import (
    ContextLengthExceeded,
    EngineError,
    EngineOverloaded,
    EngineStopped,
    InvalidRequest,
    UntunedActivation,
)

logger = logging.getLogger(__name__)


class ErrorDetail(TypedDict):
    """What went wrong. `param` is the dotted name of the offending field, where one is at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    """Body of every answer with a status of 400 or above."""

    error: ErrorDetail


class ModelNotFound(InvalidRequest):
    """The request names a model that this server does not serve."""

    def __init__(self, name: str, served: str) -> None:
        super().__init__(f"the model {name!r} does not exist here; this server serves {served!r}", "model")


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How a class of errors is reported."""

    status: int
    type: str
    code: str


_BAD_REQUEST = "invalid_request_error"
INTERNAL = ErrorKind(500, "server_error", "internal_error")

# A class stands for its subclasses too, unless they have an entry of their own.
ERROR_KINDS: dict[type[BaseException], ErrorKind] = {
    ModelNotFound: ErrorKind(404, _BAD_REQUEST, "model_not_found"),
    ContextLengthExceeded: ErrorKind(400, _BAD_REQUEST, "context_length_exceeded"),
    UntunedActivation: ErrorKind(400, _BAD_REQUEST, "untuned_activation"),
    InvalidRequest: ErrorKind(400, _BAD_REQUEST, "invalid_value"),
    EngineOverloaded: ErrorKind(429, "rate_limit_error", "engine_overloaded"),
    EngineStopped: ErrorKind(503, "service_unavailable_error", "engine_stopped"),
    BaseException: INTERNAL,
}


# Errors that FastAPI raises itself.
_HTTP_CODES = {400: "invalid_body", 404: "not_found", 405: "method_not_allowed", 413: "request_entity_too_large"}


def error_kind(error: BaseException) -> ErrorKind:
    """The table's entry for an error: its own class's, else its nearest ancestor's."""
    return next(ERROR_KINDS[cls] for cls in type(error).__mro__ if cls in ERROR_KINDS)


def error_body(error: BaseException) -> ErrorResponse:
    """The JSON body for an error. Only errors that the table names say why; the rest keep their text to the log."""
    kind = error_kind(error)
    if kind is INTERNAL:
        message = "internal error; the server's log has the details"
    else:
        message = str(error)
    param = error.field if isinstance(error, InvalidRequest) else None
    return {"error": {"message": message, "type": kind.type, "param": param, "code": kind.code}}


def error_response(error: BaseException) -> Response:
    """The HTTP answer for an error."""
    headers = (
        {"retry-after": str(max(1, math.ceil(error.retry_after)))} if isinstance(error, EngineOverloaded) else None
    )
    return _json_response(error_kind(error).status, error_body(error), headers)


def _json_response(status: int, body: ErrorResponse, headers: dict[str, str] | None = None) -> Response:
    # The standard library's encoder escapes what a client may have put into a field's name and orjson refuses.
    return Response(json.dumps(body), status, headers, media_type="application/json")


def install_handlers(app: FastAPI) -> None:
    """Make every error of an application leave it in OpenAI's shape."""
    app.add_exception_handler(EngineError, _on_engine_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_unexpected_error)


async def _on_engine_error(request: Request, error: Exception) -> Response:
    if error_kind(error) is INTERNAL:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(error)


async def _on_unexpected_error(request: Request, error: Exception) -> Response:
    return error_response(error)  # Starlette raises the error again, so the traceback reaches the log


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "http_error")
    message = str(error.detail)
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"no such path: {request.url.path}"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{request.url.path} does not accept {request.method}"
    kind = _BAD_REQUEST if error.status_code < 500 else INTERNAL.type
    body: ErrorResponse = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return _json_response(error.status_code, body, dict(error.headers or {}))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    body: ErrorResponse = {"error": describe_validation_error(error.errors()[0])}
    return _json_response(HTTPStatus.BAD_REQUEST, body)


def describe_validation_error(error: Any) -> ErrorDetail:
    """Put pydantic's first complaint in OpenAI's words.

    Args:
        error: An entry of `ValidationError.errors()`, its location beginning with "body", "path" or "query".
    """
    param = _field_name(error["loc"][1:])
    if error["type"] == "json_invalid":
        message = f"the body is not valid JSON: {error['ctx']['error']} at character {error['loc'][1]}"
        return {"message": message, "type": _BAD_REQUEST, "param": None, "code": "invalid_json"}
    if param is None:
        message = "the body must be a JSON object, sent with the header 'Content-Type: application/json'"
        return {"message": message, "type": _BAD_REQUEST, "param": None, "code": "invalid_body"}
    if error["type"] == "extra_forbidden":
        message = f"'{param}' is not a field of this endpoint, or one that this server does not implement"
        return {"message": message, "type": _BAD_REQUEST, "param": param, "code": "unsupported_field"}
    if error["type"] == "missing":
        message = f"'{param}' is required"
        return {"message": message, "type": _BAD_REQUEST, "param": param, "code": "missing_field"}
    message = f"{param}: {error['msg']}{_got(error['input'])}"
    return {"message": message, "type": _BAD_REQUEST, "param": param, "code": "invalid_value"}


def _field_name(location: Sequence[str | int]) -> str | None:
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    return name.removeprefix(".") or None


def _got(value: object) -> str:
    if not isinstance(value, str | int | float | None):
        return ""
    try:
        text = json.dumps(value)
    except ValueError:  # an integer with more digits than Python prints
        return ""
    return f", got {text}" if len(text) <= 80 else ""
