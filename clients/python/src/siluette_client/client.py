"""The client for code without asyncio. Its twin is `async_client.py`; what the two share is in the other modules."""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Self, Unpack

import httpx

from siluette_client.activation import ActivationLike
from siluette_client.answers import parse_completion, parse_models
from siluette_client.configuration import DEFAULT_LIMITS, DEFAULT_RETRY, DEFAULT_TIMEOUT, Configuration
from siluette_client.errors import SiluetteError, error_of_response, error_of_transport
from siluette_client.requests import (
    METRICS,
    MODELS,
    Call,
    CallOptions,
    Messages,
    Options,
    Prompt,
    Timeout,
    chat_call,
    compare_calls,
    generate_call,
    get_call,
    stream_call,
)
from siluette_client.retry import RetryPolicy
from siluette_client.sparsity import Sparsity, parse_sparsity
from siluette_client.streams import Stream
from siluette_client.types import Completion, Model


class Client:
    """Talks to a Siluette server. May be shared between threads; close it, or use it in a `with` block.

    Every method raises `APIError` (by status: `BadRequest`, `NotFound`, `Overloaded`, `ServerError`, `Unavailable`)
    when the server refuses, `TransportError` (`ConnectionFailed`, `RequestTimeout`) when there is no answer,
    `InvalidAnswer` when the answer is not Siluette's, and `TypeError` for an option that does not exist.

    Args:
        base_url: Address of the server, with or without `/v1`; by default the environment's SILUETTE_BASE_URL, else
            `http://127.0.0.1:8000`.
        api_key: Sent as a bearer token, for a proxy that wants one; by default SILUETTE_API_KEY, if set.
        timeout: Seconds to wait for a connection and for each piece of data (a whole answer is one piece), or httpx's
            four time-outs; by default 5 to connect, 600 for the rest. None: no limit.
        retry: Which failures are tried again, and when; None: none.
        headers: Sent with every request.
        limits: Size of the connection pool.
        http_client: An httpx client to use instead of an own one, for proxies, certificates and the like. It is not
            closed, and `limits` has no effect.

    Raises:
        ValueError: `base_url` is no http or https address.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: Timeout = DEFAULT_TIMEOUT,
        retry: RetryPolicy | None = DEFAULT_RETRY,
        headers: Mapping[str, str] | None = None,
        limits: httpx.Limits = DEFAULT_LIMITS,
        http_client: httpx.Client | None = None,
    ) -> None:
        self._configuration = Configuration.resolve(base_url, api_key, headers, timeout, retry)
        self._owns_http = http_client is None
        self._http = httpx.Client(limits=limits) if http_client is None else http_client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def base_url(self) -> str:
        """Address of the server."""
        return self._configuration.base_url

    def close(self) -> None:
        """Close all connections."""
        if self._owns_http:
            self._http.close()

    def generate(
        self, prompt: Prompt, *, activation: ActivationLike | None = None, **options: Unpack[Options]
    ) -> Completion:
        """Continue a text, or several.

        Args:
            prompt: A text, token ids, or a list of either.
            activation: How the model is activated; `silu` if left out.
            options: See `Options`.
        """
        return parse_completion(self._send(generate_call(prompt, activation, options)).content)

    def chat(
        self, messages: Messages, *, activation: ActivationLike | None = None, **options: Unpack[Options]
    ) -> Completion:
        """Answer a conversation.

        Args:
            messages: The conversation; a text alone is a user's message.
            activation: How the model is activated; `silu` if left out.
            options: See `Options`.
        """
        return parse_completion(self._send(chat_call(messages, activation, options)).content)

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        activation: ActivationLike | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """Like `generate`, or with `messages` like `chat`, with the answer in pieces while it is written.

        The request is sent when the stream is entered or iterated over, so its errors are raised there.

        Args:
            prompt: A text, token ids, or a list of either.
            messages: A conversation, instead of a prompt; a text alone is a user's message.
            activation: How the model is activated; `silu` if left out.
            options: See `Options`.
        """
        return self._stream(stream_call(prompt, messages, activation, options))

    def compare(
        self,
        prompt: Prompt | None = None,
        *,
        messages: Messages | None = None,
        activations: Sequence[ActivationLike],
        **options: Unpack[Options],
    ) -> list[Completion]:
        """Run one prompt, or one conversation, with several activations at the same time.

        All have the same seed of the token draws, drawn here if none is given, so that they differ in nothing else.
        When one fails, the others are given up and its error is raised.

        Args:
            prompt: A text, token ids, or a list of either.
            messages: A conversation, instead of a prompt; a text alone is a user's message.
            activations: One or more.
            options: See `Options`.

        Returns:
            One answer for each activation, in their order.

        Raises:
            ValueError: No activations.
        """
        calls = compare_calls(prompt, messages, activations, options)
        given_up = threading.Event()
        with ThreadPoolExecutor(len(calls), "siluette-compare") as pool:
            try:
                answers = [pool.submit(self._read_stream, call, given_up) for call in calls]
                done, _ = wait(answers, return_when=FIRST_EXCEPTION)
                failures = [error for answer in answers if answer in done and (error := answer.exception())]
                if failures:
                    raise failures[0]
                return [answer.result() for answer in answers]
            finally:  # also for a Ctrl-C: threads cannot be stopped, but look here after each piece
                given_up.set()

    def models(self, **options: Unpack[CallOptions]) -> list[Model]:
        """The served models, with the activations that each supports."""
        return parse_models(self._send(get_call(MODELS, options)).content)

    def sparsity(self, **options: Unpack[CallOptions]) -> dict[str, Sparsity]:
        """Zeros in the feed-forward layers by activation mode, over all requests since the server's start."""
        return parse_sparsity(self._send(get_call(METRICS, options)).text)

    def _stream(self, call: Call) -> Stream:
        return Stream(lambda: self._send(call, stream=True))

    def _read_stream(self, call: Call, given_up: threading.Event) -> Completion:
        with self._stream(call) as stream:
            for _ in stream:
                if given_up.is_set():
                    raise CancelledError
            return stream.completion

    def _send(self, call: Call, *, stream: bool = False) -> httpx.Response:
        """An answer with status 200, after as many attempts as the policy allows."""
        retries = 0
        while True:
            request = self._configuration.build(self._http, call)
            error: SiluetteError
            try:
                response = self._http.send(request, stream=stream)
                if response.is_success:
                    return response
                try:
                    response.read()
                finally:
                    response.close()
            except httpx.HTTPError as cause:
                error = error_of_transport(cause)
                error.__cause__ = cause
            else:
                error = error_of_response(response)
            delay = self._configuration.retry.delay(error, retries)
            if delay is None:
                raise error
            time.sleep(delay)
            retries += 1
