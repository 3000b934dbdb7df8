"""What several test modules say to the API."""

import json
from typing import Any

import httpx

MODES: list[dict[str, Any]] = [
    {"mode": "silu"},
    {"mode": "stochastic", "p": 0.6, "seed": 3},
    {"mode": "stochastic", "p": 0.6, "scope": "decode"},
    {"mode": "relu"},
]


def mode_id(activation: dict[str, Any]) -> str:
    return "-".join(str(activation[key]) for key in ("mode", "scope") if key in activation)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a streamed answer, which must be well-formed and end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert done == "data: [DONE]"
    assert rest == ""
    assert all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, which must have OpenAI's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    error: dict[str, Any] = body["error"]
    return error
