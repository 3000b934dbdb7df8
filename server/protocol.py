"""Request bodies of the API.

These models check shape and types and refuse fields that nobody reads. Ranges belong to `engine.SamplingParams` and
`engine.Activation`, which check themselves, so that the offline class and the server agree. A field set to null counts
as not sent.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from engine import Activation, ActivationMode, InvalidRequest, SamplingParams, Scope
from engine.sampling_params import MAX_LOGPROBS

DEFAULTS = SamplingParams()
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for the completion endpoint
MAX_TOKEN_ID_DIGITS = 10

Prompt = str | list[int]


class RequestModel(BaseModel):
    """Base of all request bodies: exact types, no unknown fields, null is "not sent"."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


def _check_unicode(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("unicode", "Input should be valid Unicode, without lone surrogates") from None
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]


class ActivationFields(RequestModel):
    """How the feed-forward layers are activated for this request."""

    mode: ActivationMode = Field(default=ActivationMode.SILU, strict=False)
    """`silu` is deterministic, `stochastic` draws for each negative gate value, `relu` is sparse."""
    p: float | None = None
    """Probability of SILU for a negative gate value, in [0, 1]; stochastic mode only, 0.8 if left out."""
    seed: int | None = None
    """64-bit seed of the draws; stochastic mode only. Falls back to the request's `seed`, then to a random one."""
    scope: Scope = Field(default=Scope.ALL, strict=False)
    """`all` tokens, or `decode`: generated tokens only."""

    def to_activation(self) -> Activation:
        """The engine's form.

        Raises:
            InvalidRequest: A value is out of range or has no meaning in this mode.
        """
        return Activation(self.mode, self.p, self.seed, self.scope)


class StreamOptions(RequestModel):
    """Options of a streamed answer."""

    include_usage: bool = False
    """Send a last chunk, with no choices, that holds the token counts."""


def _parse_stop(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (_check_unicode(value),)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(_check_unicode(item) for item in value)
    raise PydanticCustomError("stop", "Input should be a string or a list of strings")


StopField = Annotated[tuple[str, ...], PlainValidator(_parse_stop, json_schema_input_type=str | list[str])]


class GenerationRequest(RequestModel):
    """What both completion endpoints take."""

    model: str | None = None
    """Name of the served model, as /v1/models lists it; may be left out."""
    activation: ActivationFields = ActivationFields()
    """How the feed-forward layers are activated."""
    stream: bool = False
    """Send the answer in pieces, as server-sent events."""
    stream_options: StreamOptions | None = None
    """Only together with `stream`."""
    n: int = DEFAULTS.n
    """Number of choices for each prompt. Choice i draws from its own stream, derived from the seed."""
    seed: int | None = None
    """64-bit seed of the token draws; the server draws one if left out. The answer reports it."""
    temperature: float = DEFAULTS.temperature
    """Divides the logits, in [0, 10]; 0 is greedy decoding."""
    top_p: float = DEFAULTS.top_p
    """Keep the smallest set of tokens whose probability reaches this, in (0, 1]."""
    top_k: int = DEFAULTS.top_k
    """Keep this many most likely tokens; 0 keeps all."""
    min_p: float = DEFAULTS.min_p
    """Keep tokens at least this many times as likely as the most likely one, in [0, 1]."""
    presence_penalty: float = DEFAULTS.presence_penalty
    """Subtracted from the logit of every token generated so far, in [-2, 2]."""
    frequency_penalty: float = DEFAULTS.frequency_penalty
    """Subtracted once for each earlier occurrence of a generated token, in [-2, 2]."""
    repetition_penalty: float = DEFAULTS.repetition_penalty
    """Divides positive and multiplies negative logits of tokens in prompt or output, in (0, 10]."""
    logit_bias: dict[str, float] = {}
    """Token id (as a string) to a bias in [-100, 100] added to its logit."""
    stop: StopField = ()
    """Up to 16 strings that end the text; the string itself is not returned."""
    stop_token_ids: list[int] = []
    """Up to 64 token ids that end the text."""
    min_tokens: int = DEFAULTS.min_tokens
    """The text cannot end before this many tokens."""
    ignore_eos: bool = DEFAULTS.ignore_eos
    """Go on after the end-of-sequence token."""
    user: str | None = None
    """Accepted for compatibility: OpenAI defines it as information for the operator, and this server keeps none."""

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream = true", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a streamed answer ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias={_token_id(key): bias for key, bias in self.logit_bias.items()},
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids),
            min_tokens=self.min_tokens,
            max_tokens=max_tokens,
            ignore_eos=self.ignore_eos,
            seed=self.seed,
            logprobs=logprobs,
            n=self.n,
        )


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal()) or len(key) > MAX_TOKEN_ID_DIGITS:
        raise InvalidRequest(f"logit_bias must map token ids to numbers; {key[:20]!r} is not a token id", "logit_bias")
    return int(key)


def _parse_prompt(value: object) -> list[Prompt]:
    if isinstance(value, str):
        return [_check_unicode(value)]
    if isinstance(value, list) and value:
        if _are_token_ids(value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return [_check_unicode(item) for item in value]
        if all(_are_token_ids(item) for item in value):
            return value
    raise PydanticCustomError(
        "prompt", "Input should be a string, a list of token ids, or a list of several strings or of several such lists"
    )


def _are_token_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


PromptField = Annotated[
    list[Prompt],
    PlainValidator(_parse_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: PromptField
    """A string, a list of token ids, or a list of several of either. With several prompts, choice `p * n + i` is sample
    i of prompt p, and every prompt is run with the one seed that the answer reports."""
    max_tokens: int = COMPLETION_MAX_TOKENS
    """At most this many tokens are generated for each choice."""
    logprobs: int | None = None
    """Return the log-probability of each token and of this many alternatives, 0 to 20."""
    echo: bool = False
    """Begin each choice with its prompt; not together with `logprobs`."""
    best_of: int | None = None
    """Only the value of `n`: the server does not rank samples."""

    @model_validator(mode="after")
    def _check_combinations(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise InvalidRequest("echo cannot be combined with logprobs", "echo")
        if self.best_of is not None and self.best_of != self.n:
            raise InvalidRequest(f"best_of must equal n ({self.n}): this server does not rank samples", "best_of")
        return self

    def to_sampling(self) -> SamplingParams:
        """The engine's form of the sampling fields.

        Raises:
            InvalidRequest: A value is out of range.
        """
        return self._sampling(self.max_tokens, self.logprobs)


class TextPart(RequestModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: Text


def _parse_content(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list):
        return value
    raise PydanticCustomError("content", "Input should be a string or a list of text parts")


ContentField = Annotated[list[TextPart], BeforeValidator(_parse_content, json_schema_input_type=str | list[TextPart])]


class ChatMessage(RequestModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is OpenAI's newer name for `system`."""
    content: ContentField
    """A string, or a list of text parts that are joined by line ends."""

    def to_template(self) -> dict[str, str]:
        """The message in the form that chat templates know."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "\n".join(part.text for part in self.content)}


class ResponseFormat(RequestModel):
    """The form of the answer; only plain text is implemented."""

    type: Literal["text"]


class ChatCompletionRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    """The conversation so far; the model writes the next message."""
    max_completion_tokens: int | None = None
    """At most this many tokens are generated for each choice; until the context is full if left out."""
    max_tokens: int | None = None
    """The older name of `max_completion_tokens`."""
    logprobs: bool = False
    """Return the log-probability of each token."""
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Return this many alternatives for each token; only together with `logprobs`."""
    response_format: ResponseFormat = ResponseFormat(type="text")
    """Only `{"type": "text"}`."""

    @model_validator(mode="after")
    def _check_combinations(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs = true", "top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens are two names of one field, and differ", "max_tokens"
            )
        return self

    def to_sampling(self) -> SamplingParams:
        """The engine's form of the sampling fields.

        Raises:
            InvalidRequest: A value is out of range.
        """
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._sampling(max_tokens, (self.top_logprobs or 0) if self.logprobs else None)


class TokenizeRequest(RequestModel):
    """Body of `POST /tokenize`: a text or a conversation, not both."""

    model: str | None = None
    """Name of the served model; may be left out."""
    prompt: Text | None = None
    """The text."""
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    """A conversation, put into the model's chat template first."""
    add_special_tokens: bool = True
    """Add the tokens that begin or end a text for this model. With messages the template writes them."""

    @model_validator(mode="after")
    def _check_one_input(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("either prompt or messages is required, not both", "prompt")
        return self


class DetokenizeRequest(RequestModel):
    """Body of `POST /detokenize`."""

    model: str | None = None
    """Name of the served model; may be left out."""
    tokens: list[int]
    """Token ids."""
