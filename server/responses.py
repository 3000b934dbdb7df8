"""Bodies of the API's answers. They are plain dicts on their way out; the types document and check them."""

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from engine import Activation, ActivationMode, SampleOutput, Scope


class ActivationUsed(TypedDict):
    """The activation that was used. Sent back as it is, with the seed below, it gives the same text."""

    mode: ActivationMode
    p: float | None
    seed: int | None
    scope: Scope


class PromptTokensDetails(TypedDict):
    """`cached_tokens` came from the prefix cache."""

    cached_tokens: int


class Usage(TypedDict):
    """Token counts over all prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AnswerHead(TypedDict):
    """What every answer, and every event of a streamed one, begins with."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class AnswerEnd(TypedDict):
    """Token counts, and what was used: sent with the same request, it gives the same text."""

    usage: Usage
    activation: ActivationUsed
    seed: int


class CompletionLogprobs(TypedDict):
    """Log-probabilities in the completion endpoint's form: parallel lists, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ChoiceEnd(TypedDict):
    """How a sample ended, and its share of zeros in the feed-forward. Both are null in pieces before the last one."""

    finish_reason: str | None
    sparsity: float | None


class CompletionChoice(ChoiceEnd):
    """One sample of one prompt, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None


class CompletionResponse(AnswerHead, AnswerEnd):
    """Answer of `/v1/completions`."""

    choices: list[CompletionChoice]


class TopLogprob(TypedDict):
    """A token and its log-probability. `bytes` are exact where `token` shows U+FFFD for a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(TopLogprob):
    """The token of one position and its most likely alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log-probabilities in the chat endpoint's form."""

    content: list[TokenLogprobs]
    refusal: None


class ChatAnswer(TypedDict):
    """The message that the model wrote."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(ChoiceEnd):
    """One sample."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None


class ChatCompletionResponse(AnswerHead, AnswerEnd):
    """Answer of `/v1/chat/completions`."""

    choices: list[ChatChoice]


class ChatDelta(TypedDict):
    """A piece of the message; `role` comes with the first one."""

    role: NotRequired[Literal["assistant"]]
    content: str


class ChatChunkChoice(ChoiceEnd):
    """A piece of one sample, in a streamed answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None


class ModelCard(TypedDict):
    """A served model and the activations it may be used with."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    dtype: str
    quantization: str
    weight_bytes: int
    activations: "ActivationLimits"


class ActivationLimits(TypedDict):
    """What the checkpoint was tuned for."""

    modes: list[ActivationMode]
    min_p: float
    max_p: float
    tuned: bool
    sparsity: float | None


class ModelList(TypedDict):
    """Answer of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(TypedDict):
    """Answer of `/tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeResponse(TypedDict):
    """Answer of `/detokenize`."""

    prompt: str


class StatusResponse(TypedDict):
    """Answer of the probes."""

    status: Literal["ok", "draining", "stopped"]


class HealthResponse(StatusResponse):
    """Answer of `/health`."""

    model: str
    running: int
    waiting: int
    kv_cache_usage: float


class VersionResponse(TypedDict):
    """Answer of `/version`."""

    version: str


def choice_end(sample: SampleOutput) -> ChoiceEnd:
    """A sample's end in the API's form."""
    return {"finish_reason": sample.finish_reason, "sparsity": sample.sparsity}


def activation_used(activation: Activation) -> ActivationUsed:
    """An activation in the API's form."""
    return {"mode": activation.mode, "p": activation.p, "seed": activation.seed, "scope": activation.scope}
