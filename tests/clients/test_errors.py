"""From the server's and httpx's errors to the client's."""

import json
import pickle
from typing import Any

import httpx
import pytest

from engine import InvalidRequest
from server.errors import ERROR_KINDS, error_body
from siluette_client import (
    APIError,
    BadRequest,
    ConnectionFailed,
    ContextLengthExceeded,
    InvalidAnswer,
    NotFound,
    Overloaded,
    RequestTimeout,
    ServerError,
    SiluetteError,
    TransportError,
    Unavailable,
    UntunedActivation,
)
from siluette_client.errors import error_of_event, error_of_response, error_of_transport


def answer(status: int, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.Response(status, content=content, headers=headers)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequest),
        (401, BadRequest),
        (404, NotFound),
        (405, BadRequest),
        (413, BadRequest),
        (429, Overloaded),
        (500, ServerError),
        (502, Unavailable),
        (503, Unavailable),
        (504, Unavailable),
        (599, ServerError),
    ],
)
def test_each_status_has_its_class(status: int, kind: type[APIError]) -> None:
    error = error_of_response(answer(status, {}))

    assert type(error) is kind
    assert error.status == status


@pytest.mark.parametrize("cls", [cls for cls in ERROR_KINDS if cls is not BaseException], ids=lambda cls: cls.__name__)
def test_every_error_of_the_server_keeps_all_that_it_says(cls: type[Any]) -> None:
    field = issubclass(cls, InvalidRequest)
    raised = cls("a", "b") if field else cls("too bad")
    said = error_body(raised)["error"]
    error = error_of_response(answer(ERROR_KINDS[cls].status, {"error": said}))

    assert (error.message, error.type, error.param, error.code) == tuple(said.values())


@pytest.mark.parametrize(
    ("code", "kind"),
    [("context_length_exceeded", ContextLengthExceeded), ("untuned_activation", UntunedActivation)],
)
def test_two_codes_have_classes_of_their_own(code: str, kind: type[BadRequest]) -> None:
    assert type(error_of_response(answer(400, {"error": {"message": "no", "code": code}}))) is kind
    assert type(error_of_response(answer(500, {"error": {"message": "no", "code": code}}))) is ServerError


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>Bad gateway</html>", "<html>Bad gateway</html>"),
        (b"", "Bad Gateway"),
        (b"x" * 1000, "x" * 300),
        ([1], "[1]"),
        ({"error": "down"}, "down"),
        ({"error": {"message": 7}}, '{"error": {"message": 7}}'),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_bodies_of_other_servers_are_shown(body: Any, message: str) -> None:
    assert error_of_response(answer(502, body)).message == message


def test_headers_are_read() -> None:
    error = error_of_response(answer(429, {}, **{"retry-after": "7", "x-request-id": "abc"}))

    assert (error.retry_after, error.request_id) == (7, "abc")


def test_text_of_an_error_ends_with_what_programs_look_at() -> None:
    error = BadRequest("p must be in [0, 1]", 400, param="activation.p", code="invalid_value")

    assert str(error) == "p must be in [0, 1] (status 400, code invalid_value, param activation.p)"
    assert str(APIError("no")) == "no"


def test_errors_cross_process_borders() -> None:
    error = Overloaded("full", 429, "rate_limit_error", None, "engine_overloaded", "abc", 1.0)
    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is Overloaded
    assert vars(copy) == vars(error)


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (httpx.ConnectError("refused"), ConnectionFailed),
        (httpx.ReadError(""), ConnectionFailed),
        (httpx.RemoteProtocolError("disconnected"), ConnectionFailed),
        (httpx.ProxyError("407"), ConnectionFailed),
        (httpx.ConnectTimeout(""), RequestTimeout),
        (httpx.ReadTimeout(""), RequestTimeout),
        (httpx.PoolTimeout(""), RequestTimeout),
        (httpx.LocalProtocolError("illegal header"), TransportError),
        (httpx.DecodingError("gzip"), InvalidAnswer),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_httpx_errors_become_ours(cause: httpx.HTTPError, kind: type[SiluetteError]) -> None:
    error = error_of_transport(cause)

    assert type(error) is kind
    assert type(cause).__name__ in str(error)


@pytest.mark.parametrize("event", [{}, [], 7, {"message": None}])
def test_an_error_event_without_a_message_is_an_error_all_the_same(event: object) -> None:
    assert "without a message" in error_of_event(event, None).message
