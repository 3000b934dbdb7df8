"""Where a client sends its requests, and what goes with each of them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import httpx

from siluette_client.requests import Call, Timeout
from siluette_client.retry import NO_RETRIES, RetryPolicy

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
DEFAULT_LIMITS = httpx.Limits(max_connections=1000, max_keepalive_connections=100)
DEFAULT_RETRY = RetryPolicy()
BASE_URL_VARIABLE, API_KEY_VARIABLE = "SILUETTE_BASE_URL", "SILUETTE_API_KEY"

try:
    __version__ = version("siluette-client")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "unknown"


@dataclass(frozen=True, slots=True)
class Configuration:
    """What both clients are made of.

    Attributes:
        base_url: Address without a slash or `/v1` at the end.
        headers: Sent with every request.
        timeout: Unless a call has its own.
        retry: Which failures are tried again.
    """

    base_url: str
    headers: httpx.Headers = field(repr=False)
    timeout: Timeout
    retry: RetryPolicy

    @classmethod
    def resolve(
        cls,
        base_url: str | None,
        api_key: str | None,
        headers: Mapping[str, str] | None,
        timeout: Timeout,
        retry: RetryPolicy | None,
    ) -> "Configuration":
        """Fill in what is left out from the environment and from the defaults.

        Raises:
            ValueError: The base URL is no http or https address.
        """
        url = normal_base_url(base_url or os.environ.get(BASE_URL_VARIABLE) or DEFAULT_BASE_URL)
        merged = httpx.Headers({"User-Agent": f"siluette-client/{__version__}"})
        key = api_key or os.environ.get(API_KEY_VARIABLE)
        if key:
            merged["Authorization"] = f"Bearer {key}"
        merged.update(headers)
        return cls(url, merged, timeout, retry or NO_RETRIES)

    def build(self, http: httpx.Client | httpx.AsyncClient, call: Call) -> httpx.Request:
        """The request of a call.

        Raises:
            ValueError, TypeError: A value has no form in JSON.
        """
        headers = httpx.Headers(self.headers)
        if call.body is not None:
            headers["Content-Type"] = "application/json"
        headers.update(call.options.get("headers"))
        timeout = call.options.get("timeout", self.timeout)
        return http.build_request(
            call.method, self.base_url + call.path, content=call.content, headers=headers, timeout=timeout
        )


def normal_base_url(text: str) -> str:
    """An address without a slash or `/v1` at its end; with `/v1` is how OpenAI's clients name it.

    Raises:
        ValueError: It is no http or https address.
    """
    try:
        url = httpx.URL(text)
        valid = url.scheme in ("http", "https") and bool(url.host) and not (url.query or url.fragment)
    except httpx.InvalidURL:
        valid = False
    if not valid:
        raise ValueError(f"base_url must look like {DEFAULT_BASE_URL!r}, got {text!r}")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")
