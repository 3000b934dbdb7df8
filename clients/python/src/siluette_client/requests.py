"""From a method's arguments to the HTTP request: pure, and shared by both clients."""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import httpx

from siluette_client.activation import ActivationLike, as_activation

COMPLETIONS, CHAT, MODELS, METRICS = "/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics"
SEED_BITS = 53  # integers that every JSON reader keeps exact


class Message(TypedDict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""A text, token ids, or several of either."""

Messages = str | Sequence[Message]
"""A conversation; a text alone is a user's message."""

Timeout = float | httpx.Timeout | None
"""Seconds, httpx's four time-outs, or None for no limit."""


class CallOptions(TypedDict, total=False):
    """What every method takes.

    Attributes:
        timeout: Instead of the client's. It limits the wait for a connection and each wait for data: of a whole
            answer, which comes in one piece, that is the time until it is there; of a stream, the time between pieces.
        headers: Added to the client's.
    """

    timeout: Timeout
    headers: Mapping[str, str]


class Options(CallOptions, total=False):
    """What every method that generates text takes. None counts as not given, and the server's default holds.

    Attributes:
        model: Name of the served model.
        max_tokens: At most this many tokens for each sample; the server's default is 16 for `generate`, and all that
            the context holds for `chat`.
        n: Samples for each prompt; sample i has a random stream of its own.
        seed: 64-bit seed of the token draws; the server draws one if left out. Answers report it.
        temperature: Divides the logits; 0 is greedy.
        top_p: Keep the smallest set of tokens whose probability reaches this.
        top_k: Keep this many most likely tokens; 0 keeps all.
        min_p: Keep tokens at least this many times as likely as the most likely one.
        presence_penalty: Subtracted from the logit of every token generated so far.
        frequency_penalty: Subtracted once for each earlier occurrence.
        repetition_penalty: Divides positive and multiplies negative logits of tokens in prompt or output.
        logit_bias: Token id to a bias that is added to its logit.
        stop: Strings that end the text; not returned.
        stop_token_ids: Token ids that end the text.
        min_tokens: The text cannot end before this many tokens.
        ignore_eos: Go on after the end-of-sequence token.
        logprobs: Return the log-probability of each token and of this many alternatives.
        echo: Begin each text with its prompt; not for chats.
        extra_body: More fields of the request's body, for servers newer than this client.
    """

    model: str | None
    max_tokens: int | None
    n: int | None
    seed: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    min_tokens: int | None
    ignore_eos: bool | None
    logprobs: int | None
    echo: bool | None
    extra_body: Mapping[str, object]


NOT_IN_BODY = {"timeout", "headers", "extra_body"}
KNOWN_CALL_OPTIONS = frozenset(CallOptions.__annotations__)
KNOWN_OPTIONS = KNOWN_CALL_OPTIONS | frozenset(Options.__annotations__)


@dataclass(frozen=True, slots=True)
class Call:
    """One request, still without the server's address.

    Attributes:
        options: `timeout` and `headers`, where given.
    """

    method: Literal["GET", "POST"]
    path: str
    body: Mapping[str, object] | None
    options: CallOptions

    @property
    def content(self) -> bytes | None:
        """The body as JSON.

        Raises:
            ValueError: A number is NaN or infinite.
            TypeError: A value has no form in JSON.
        """
        # ASCII: half of a surrogate pair reaches the server, which refuses it by the name of its field.
        return None if self.body is None else json.dumps(self.body, allow_nan=False, separators=(",", ":")).encode()


def get_call(path: str, options: CallOptions) -> Call:
    """A question without a body.

    Raises:
        TypeError: An option that does not exist.
    """
    _check_names(options, KNOWN_CALL_OPTIONS)
    return Call("GET", path, None, options)


def generate_call(prompt: Prompt, activation: ActivationLike | None, options: Options, *, stream: bool = False) -> Call:
    """A request for completions.

    Raises:
        TypeError: An option that does not exist.
    """
    body: dict[str, object] = {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
    return _generation_call(COMPLETIONS, body, activation, options, stream)


def chat_call(messages: Messages, activation: ActivationLike | None, options: Options, *, stream: bool = False) -> Call:
    """A request for chat completions.

    Raises:
        TypeError: An option that does not exist.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    body: dict[str, object] = {"messages": [dict(message) for message in messages]}
    if options.get("logprobs") is not None:
        body |= {"logprobs": True, "top_logprobs": options["logprobs"]}
    return _generation_call(CHAT, body, activation, options, stream)


def stream_call(
    prompt: Prompt | None, messages: Messages | None, activation: ActivationLike | None, options: Options
) -> Call:
    """A request for a streamed answer to a prompt or to a conversation.

    Raises:
        TypeError: Both or neither are given, or an option that does not exist.
    """
    if prompt is not None and messages is None:
        return generate_call(prompt, activation, options, stream=True)
    if messages is not None and prompt is None:
        return chat_call(messages, activation, options, stream=True)
    raise TypeError("give either a prompt or messages")


def compare_calls(
    prompt: Prompt | None, messages: Messages | None, activations: Sequence[ActivationLike], options: Options
) -> list[Call]:
    """A request for each activation, all with one seed of the token draws, so that nothing else differs.

    Raises:
        TypeError: As `stream_call`, or `activations` is a text.
        ValueError: No activations.
    """
    if isinstance(activations, str):
        raise TypeError(f"activations must be a list of activations, got {activations!r}")
    if not activations:
        raise ValueError("activations must hold at least one activation")
    if options.get("seed") is None:
        options = {**options, "seed": secrets.randbits(SEED_BITS)}
    return [stream_call(prompt, messages, activation, options) for activation in activations]


def _generation_call(
    path: str, body: dict[str, object], activation: ActivationLike | None, options: Options, stream: bool
) -> Call:
    _check_names(options, KNOWN_OPTIONS)
    for name, value in options.items():
        if value is not None and name not in NOT_IN_BODY:
            body.setdefault(name, value)  # a chat's logprobs are in the body already, in that endpoint's form
    if activation is not None:
        body["activation"] = as_activation(activation).to_wire()
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    body |= options.get("extra_body", {})
    call_options: CallOptions = {}
    if "timeout" in options:
        call_options["timeout"] = options["timeout"]
    if "headers" in options:
        call_options["headers"] = options["headers"]
    return Call("POST", path, body, call_options)


def _check_names(options: CallOptions, known: frozenset[str]) -> None:
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; the options are {', '.join(sorted(known))}")
