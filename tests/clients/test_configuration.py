"""Where requests go, and what goes with them."""

import httpx
import pytest

from siluette_client import AsyncClient, Client, RetryPolicy
from siluette_client.configuration import DEFAULT_TIMEOUT, Configuration, normal_base_url
from siluette_client.requests import CallOptions, generate_call, get_call
from siluette_client.retry import NO_RETRIES


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SILUETTE_BASE_URL", "SILUETTE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def configuration(base_url: str | None = None, api_key: str | None = None, **headers: str) -> Configuration:
    return Configuration.resolve(base_url, api_key, headers, DEFAULT_TIMEOUT, RetryPolicy())


def build(configuration: Configuration, options: CallOptions) -> httpx.Request:
    with httpx.Client() as http:
        return configuration.build(http, get_call("/v1/models", options))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("https://example.org/models/siluette/v1", "https://example.org/models/siluette"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_addresses(text: str, url: str) -> None:
    assert normal_base_url(text) == url


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1:8000", "localhost", "ftp://host", "http://", "http://host:port", "http://host?x=1", "http://h#x"],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="base_url must look like 'http://127"):
            kind(text)


def test_arguments_come_before_the_environment_before_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configuration().base_url == "http://127.0.0.1:8000"
    monkeypatch.setenv("SILUETTE_BASE_URL", "http://environment/v1")
    monkeypatch.setenv("SILUETTE_API_KEY", "from-environment")
    assert configuration().base_url == "http://environment"
    assert configuration().headers["authorization"] == "Bearer from-environment"
    assert configuration("http://argument").base_url == "http://argument"
    assert configuration(api_key="argument").headers["authorization"] == "Bearer argument"


def test_a_calls_headers_and_time_out_replace_the_clients() -> None:
    ours = configuration(**{"X-Team": "moon", "User-Agent": "mine"})
    usual = build(ours, {})
    special = build(ours, {"timeout": 3, "headers": {"x-team": "sun", "X-More": "1"}})
    unlimited = build(ours, {"timeout": None})

    assert (usual.headers["x-team"], usual.headers["user-agent"]) == ("moon", "mine")
    assert usual.extensions["timeout"] == {"connect": 5, "read": 600, "write": 600, "pool": 600}
    assert (special.headers["x-team"], special.headers["x-more"]) == ("sun", "1")
    assert set(special.extensions["timeout"].values()) == {3}
    assert set(unlimited.extensions["timeout"].values()) == {None}


def test_bodies_are_json() -> None:
    with httpx.Client() as http:
        request = configuration().build(http, generate_call("Grüße", None, {}))

    assert request.headers["content-type"] == "application/json"
    assert request.content == b'{"prompt":"Gr\\u00fc\\u00dfe"}'


def test_no_policy_is_no_retries() -> None:
    assert Configuration.resolve(None, None, None, None, None).retry is NO_RETRIES


def test_a_key_does_not_show() -> None:
    assert "secret" not in repr(configuration(api_key="secret"))
