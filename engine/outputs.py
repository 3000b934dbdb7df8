"""What a caller gets back: the output of a request, whole or in pieces."""

from dataclasses import dataclass, field
from enum import StrEnum

from engine.activation import Activation


class FinishReason(StrEnum):
    """Why a sample ended."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens reached or context full
    ABORT = "abort"  # the caller withdrew the request
    ERROR = "error"  # the model's logits were not finite


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token under the model's own distribution (before temperature, penalties and bias)."""

    token_id: int
    token: str  # text of this token alone; U+FFFD where it is a part of a character
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The chosen token of one position and its most likely alternatives, best first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(slots=True)
class SampleOutput:
    """One sample's text, or the next piece of it.

    A streamed piece may have tokens and no text (an incomplete character or a possible stop string is held back), or
    text and no tokens (what was held back is released at the end). The last one has the finish reason and the sparsity.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it; None for end-of-sequence
    sparsity: float | None = None  # share of zeros in act(gate), over all layers, of the rows that gave its tokens

    def extend(self, piece: "SampleOutput") -> None:
        """Append the next piece of the same sample."""
        self.text += piece.text
        self.token_ids += piece.token_ids
        if piece.logprobs is not None:
            self.logprobs = (self.logprobs or []) + piece.logprobs
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason
            self.stop_reason = piece.stop_reason
            self.sparsity = piece.sparsity


@dataclass(slots=True)
class RequestOutput:
    """Output of one request; streamed, it holds only the samples that moved and only what is new of them.

    `activation` and `seed` are the ones that were used, seeds filled in: sending them again gives the same text.
    """

    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int  # prompt tokens whose keys and values came from the prefix cache (first sample)
    activation: Activation
    seed: int
    samples: list[SampleOutput]
    prompt_logprobs: tuple[float, ...] | None = None  # of all tokens but the first, if the prompt is scored
    finished: bool = False  # every sample has its finish reason
    queue_seconds: float = 0.0  # from submission until the first of these samples had a place in the batch

    def extend(self, piece: "RequestOutput") -> None:
        """Append the next piece of the same request, sample by sample.

        `num_cached_tokens` and `queue_seconds` stay those of the first piece, which the first sample began.
        """
        by_index = {sample.index: sample for sample in self.samples}
        for sample in piece.samples:
            if sample.index in by_index:
                by_index[sample.index].extend(sample)
            else:
                self.samples.append(sample)
                by_index[sample.index] = sample
        self.finished = piece.finished


@dataclass(frozen=True, slots=True)
class PromptScore:
    """How likely the model holds a prompt to be.

    Attributes:
        token_ids: The prompt.
        logprobs: Log-probability of every token but the first, given those before it: one fewer than `token_ids`. NaN
            where the model's logits are not finite.
        activation: The one that was used, its seed filled in.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    activation: Activation
