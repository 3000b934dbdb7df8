"""How the next token is chosen: the parameters of one request."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS_ENTRIES = 1024
MAX_N = 128
MAX_TEMPERATURE = 10.0
SEED_MIN, SEED_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request. Defaults sample from the model's own distribution.

    Args:
        temperature: Divides the logits; 0 is greedy decoding. In [0, 10].
        top_p: Keep the smallest set of tokens whose probability reaches `top_p`. In (0, 1].
        top_k: Keep the `top_k` most likely tokens; 0 keeps all.
        min_p: Keep tokens at least `min_p` times as likely as the most likely one. In [0, 1].
        presence_penalty: Subtracted from the logit of every token generated so far. In [-2, 2].
        frequency_penalty: Subtracted once per earlier occurrence of a generated token. In [-2, 2].
        repetition_penalty: Divides positive and multiplies negative logits of tokens in prompt or output
            (CTRL, arXiv 1909.05858). In (0, 10].
        logit_bias: Token id to a bias in [-100, 100] added to its logit.
        stop: Strings that end the text; the string itself is not returned.
        stop_token_ids: Token ids that end the text.
        min_tokens: End-of-sequence and stop tokens are impossible before this many tokens, and stop strings do not
            count in them.
        max_tokens: At most this many tokens; None generates until the context is full.
        ignore_eos: Go on after the end-of-sequence token.
        seed: 64-bit seed of the token draws; None draws one, which the output reports.
        logprobs: Return the log-probability of each token and of this many alternatives (0 to 20); None returns none.
        n: Number of samples for the prompt. Sample `i` has its own random stream derived from the seed.

    Raises:
        InvalidRequest: A value is outside its range; `field` names it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    max_tokens: int | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        # stop="\n" is the natural way to write one stop string.
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        check_number("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        check_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        _at_least("top_k", self.top_k, 0)
        _at_least("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None:
            _at_least("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequest(
                    f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens})", "min_tokens"
                )
        _int_in_range("n", self.n, 1, MAX_N)
        if self.logprobs is not None:
            _int_in_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _int_in_range("seed", self.seed, SEED_MIN, SEED_MAX)
        self._check_stop()
        if len(self.logit_bias) > MAX_LOGIT_BIAS_ENTRIES:
            raise InvalidRequest(
                f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS_ENTRIES} are allowed",
                "logit_bias",
            )
        for bias in self.logit_bias.values():
            check_number("logit_bias", bias, -100.0, 100.0)

    def _check_stop(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are allowed", "stop")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequest("stop must hold non-empty strings", "stop")
            if len(text) > MAX_STOP_STRING_CHARS:
                raise InvalidRequest(
                    f"a stop string has {len(text)} characters; at most {MAX_STOP_STRING_CHARS} are allowed", "stop"
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(
                f"stop_token_ids has {len(self.stop_token_ids)} entries; at most {MAX_STOP_TOKEN_IDS} are allowed",
                "stop_token_ids",
            )


def check_number(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    """Refuse what is no finite number in [low, high], or in (low, high] with `open_low`; `name` is the field's."""
    bracket = "(" if open_low else "["
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value > high or value < low or (open_low and value == low):
        raise InvalidRequest(f"{name} must be a number in {bracket}{low:g}, {high:g}], got {value!r}", name)


def _at_least(name: str, value: int, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise InvalidRequest(f"{name} must be an integer of at least {low}, got {value!r}", name)


def _int_in_range(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be an integer in [{low}, {high}], got {value!r}", name)
