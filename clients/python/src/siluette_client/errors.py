"""Every error that the client raises on purpose.

```
SiluetteError
├── APIError                    the server answered with an error: status, code, param, message
│   ├── BadRequest              400 and other 4xx: a request that cannot succeed as it is
│   │   ├── ContextLengthExceeded
│   │   └── UntunedActivation
│   ├── NotFound                404: another model, another path
│   ├── Overloaded              429: the queue is full
│   ├── ServerError             5xx
│   │   └── Unavailable         502, 503, 504: shutting down, restarting, or a proxy without a server
│   └── StreamFailed            an error event in the middle of a stream
├── TransportError              there was no whole answer
│   ├── ConnectionFailed        refused, reset or closed before the answer
│   ├── RequestTimeout
│   └── StreamInterrupted       the connection ended in the middle of a stream
└── InvalidAnswer               an answer that is not the API's
```
"""

import json
from collections.abc import Mapping
from http import HTTPStatus

import httpx

from siluette_client.retry_after import parse_retry_after

SHOWN_BODY = 300  # characters of an answer that is no JSON


class SiluetteError(Exception):
    """Base class of all errors of this package."""


class TransportError(SiluetteError):
    """There was no whole answer. `__cause__` is httpx's error."""


class ConnectionFailed(TransportError):
    """The connection was refused, reset, or closed before the answer."""


class RequestTimeout(TransportError):
    """Nothing came for as long as the time-out allows, or no connection could be made in time."""


class StreamInterrupted(TransportError):
    """The connection ended in the middle of a stream. What had arrived is in the stream's `completion`."""


class InvalidAnswer(SiluetteError):
    """The answer is not what the API says: another kind of server, or a proxy's page."""


class APIError(SiluetteError):
    """The server answered with an error.

    Attributes:
        message: The server's words.
        status: HTTP status; None for an error in the middle of a stream, whose status was 200.
        type: OpenAI's class of the error, such as `"invalid_request_error"`.
        param: Dotted name of the field at fault, such as `"activation.p"`; None if no single one is.
        code: What went wrong, for programs: `"invalid_value"`, `"engine_overloaded"`, ...
        request_id: The server's id of the request, where it says one.
        retry_after: Seconds after which the server asks to try again, where it says so.
    """

    def __init__(
        self,
        message: str,
        status: int | None = None,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        # All arguments go up, so that the error can be pickled and cross a process border.
        super().__init__(message, status, type, param, code, request_id, retry_after)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.request_id = request_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        """The server's words, then what programs look at."""
        details = [f"{name} {value}" for name in ("status", "code", "param") if (value := getattr(self, name))]
        return f"{self.message} ({', '.join(details)})" if details else self.message


class BadRequest(APIError):
    """The request can never succeed as it is (4xx); `param` names the field."""


class ContextLengthExceeded(BadRequest):
    """The prompt does not fit the model's context."""


class UntunedActivation(BadRequest):
    """The served checkpoint was not tuned for this activation; the message says what it supports."""


class NotFound(APIError):
    """The server has no such model or path (404)."""


class Overloaded(APIError):
    """The server's queue is full (429). `retry_after` says when to try again."""


class ServerError(APIError):
    """A defect of the server or of what stands before it (5xx)."""


class Unavailable(ServerError):
    """The server is shutting down, has died, or a proxy cannot reach it (502, 503, 504)."""


class StreamFailed(APIError):
    """The server reported an error in the middle of a stream. What had arrived is in the stream's `completion`."""


_BY_CODE = {"context_length_exceeded": ContextLengthExceeded, "untuned_activation": UntunedActivation}
_BY_STATUS = {404: NotFound, 429: Overloaded, 502: Unavailable, 503: Unavailable, 504: Unavailable}


def error_of_response(response: httpx.Response) -> APIError:
    """The error that an answer with a status of 300 or above is. Its body must have been read."""
    detail = _error_detail(response.text)
    status, code = response.status_code, detail.get("code")
    kind: type[APIError] = _BY_STATUS.get(status, ServerError if status >= 500 else BadRequest)
    if kind is BadRequest and code is not None:
        kind = _BY_CODE.get(code, BadRequest)
    return kind(
        detail.get("message") or response.text[:SHOWN_BODY].strip() or _phrase(status),
        status,
        detail.get("type"),
        detail.get("param"),
        code,
        response.headers.get("x-request-id"),
        parse_retry_after(response.headers.get("retry-after")),
    )


def error_of_event(error: object, request_id: str | None) -> StreamFailed:
    """The error that an event `{"error": {...}}` of a stream reports."""
    detail = _texts(error)
    message = detail.get("message") or "the server reported an error without a message"
    return StreamFailed(message, None, detail.get("type"), detail.get("param"), detail.get("code"), request_id)


def error_of_transport(error: httpx.HTTPError) -> SiluetteError:
    """The error of this package for one of httpx's, which happened before an answer was there."""
    said = f": {error}" if str(error) else ""
    if isinstance(error, httpx.TimeoutException):
        return RequestTimeout(f"the request timed out ({type(error).__name__}{said})")
    if isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError | httpx.ProxyError):
        return ConnectionFailed(f"no answer from the server ({type(error).__name__}{said})")
    if isinstance(error, httpx.TransportError):
        return TransportError(f"the request could not be sent ({type(error).__name__}{said})")
    return InvalidAnswer(f"the answer cannot be read ({type(error).__name__}{said})")


def _error_detail(body: str) -> dict[str, str]:
    try:
        answer = json.loads(body)
    except ValueError:
        return {}
    return _texts(answer.get("error")) if isinstance(answer, dict) else {}


def _texts(error: object) -> dict[str, str]:
    if isinstance(error, str):
        return {"message": error}
    if not isinstance(error, Mapping):
        return {}
    return {str(name): value for name, value in error.items() if isinstance(value, str)}


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"the server answered with status {status}"
