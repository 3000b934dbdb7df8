"""What the server answers. Fields that a newer server adds are kept, in `model_extra`.

Completions and chat completions, whole or streamed, become the same types: a sample has a text and a reason why it
ended, whichever endpoint wrote it.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from siluette_client.activation import Activation


class Answer(BaseModel):
    """Base of what is read: immutable, tolerant of fields that it does not know."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)


class TopLogprob(Answer):
    """A token and its log-probability under the model, before temperature, penalties and bias."""

    token: str
    logprob: float
    bytes: list[int] | None = None
    """The token's bytes, exact where `token` shows U+FFFD for a part of a character; chat only."""


class TokenLogprob(TopLogprob):
    """The token of one position, and its most likely alternatives."""

    top_logprobs: list[TopLogprob] = []


def _logprobs_of_wire(value: object) -> object:
    """One list of tokens out of either endpoint's form."""
    if not isinstance(value, Mapping):
        return value
    if "content" in value:  # chat completions
        return value["content"]
    tokens, logprobs = value.get("tokens"), value.get("token_logprobs")
    tops = value.get("top_logprobs")
    if not isinstance(tokens, list) or not isinstance(logprobs, list):
        raise ValueError("logprobs without lists of tokens and of their log-probabilities")
    if not isinstance(tops, list):
        tops = [None] * len(tokens)
    return [
        {
            "token": token,
            "logprob": logprob,
            "top_logprobs": [{"token": other, "logprob": best} for other, best in (top or {}).items()],
        }
        for token, logprob, top in zip(tokens, logprobs, tops, strict=True)
    ]


class Choice(Answer):
    """One sample of one prompt."""

    index: int
    """Sample `i` of prompt `p` has index `p · n + i`."""
    text: str = ""
    """What the model wrote; of a chat, the content of its message."""
    finish_reason: str | None = None
    """`stop`, `length`, `error`; None while the sample is not finished."""
    sparsity: float | None = None
    """Share of zeros among the activated gate values that gave the sample's tokens, in [0, 1]; None until it ends."""
    logprobs: Annotated[list[TokenLogprob] | None, BeforeValidator(_logprobs_of_wire)] = None

    @model_validator(mode="before")
    @classmethod
    def _text_of_message(cls, data: Any) -> Any:
        for name in ("message", "delta"):
            if isinstance(data, dict) and isinstance(data.get(name), dict):
                data = {**data, "text": data[name].get("content") or ""}
                del data[name]
        return data


class Chunk(Choice):
    """A new piece of one sample of a streamed answer: `text` and `logprobs` are what has been added."""


class PromptTokensDetails(Answer):
    """More on the prompt's tokens."""

    cached_tokens: int = 0
    """How many of them came from the prefix cache."""


class Usage(Answer):
    """Token counts over all prompts and samples; a prompt counts once, however many samples it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details else 0


class Completion(Answer):
    """An answer, with what is needed to get it again: the same request with this `seed` and this `activation`."""

    id: str
    model: str
    created: int
    """Unix time, in seconds."""
    system_fingerprint: str | None = None
    """Changes with whatever may change the tokens of a seeded request: model, dtype, quantisation, version."""
    choices: list[Choice]
    """In the order of their `index`."""
    activation: Activation
    """The activation that was used, its seed filled in."""
    seed: int
    """The seed of the token draws that was used."""
    usage: Usage | None = None
    """None only while a stream is not at its end."""

    @property
    def text(self) -> str:
        """The text of the first sample; empty if there is none."""
        return self.choices[0].text if self.choices else ""

    @property
    def sparsity(self) -> float | None:
        """The share of zeros of the first sample, see `Choice.sparsity`."""
        return self.choices[0].sparsity if self.choices else None

    @property
    def texts(self) -> list[str]:
        """The texts of all samples."""
        return [choice.text for choice in self.choices]


class ActivationSupport(Answer):
    """What a checkpoint was tuned for."""

    modes: list[str]
    min_p: float
    max_p: float
    tuned: bool
    sparsity: float | None = None
    """Share of zeros in RELU mode that the checkpoint's makers measured; None where they did not say."""


class Model(Answer):
    """A served model."""

    id: str
    created: int
    """Unix time of the server's start, in seconds."""
    owned_by: str
    max_model_len: int
    """Longest sequence in tokens, prompt and output together."""
    dtype: str
    quantization: str
    """`none`, `int8` or `int4`."""
    weight_bytes: int
    """Memory that the weights take."""
    activations: ActivationSupport


class ModelList(Answer):
    """The served models."""

    data: list[Model]
