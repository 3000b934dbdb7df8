"""What the load generator sends: requests that follow from the settings and the seed alone.

Prompts are English words in random order. Given a `Vocabulary` of words that are one token each for the tokenizer at
hand, a prompt has exactly the number of tokens that was asked for. Two prompts share no beginning that a prefix cache
could use, except the one asked for with `shared_prefix_tokens`.
"""

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

MODES = ("silu", "stochastic", "relu")  # `engine.ActivationMode`, without the import of torch that costs seconds
MIN_WORDS = 32  # with fewer, prompts would repeat themselves: such a tokenizer gets approximate lengths
FIRST_WORD = "The"  # begins every prompt: the first word of a text has another spelling in most vocabularies

_WORD_TEXT = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power
hour game line end member law car city community name president team minute idea body information back parent face
others level office door health person art war history party result change morning reason research girl guy moment air
teacher force education good new first last long great little own other old big high different small large next early
young important few public bad same able ask seem feel try leave call need become put mean keep let begin help talk
turn start show hear play run move like live believe hold bring happen write provide sit stand lose pay meet include
continue set learn lead understand watch follow stop create speak read allow add spend grow open walk win offer
remember love consider appear buy wait serve die send expect build stay fall cut reach kill remain
"""
WORDS = tuple(_WORD_TEXT.split())


@dataclass(frozen=True, slots=True)
class Length:
    """A length in tokens, uniform in [mean - spread, mean + spread].

    Raises:
        ValueError: The shortest length is below 1 or `spread` is negative.
    """

    mean: int
    spread: int = 0

    def __post_init__(self) -> None:
        if self.spread < 0 or self.mean - self.spread < 1:
            raise ValueError(f"a length must be at least 1 token, '{self}' is not")

    @classmethod
    def parse(cls, text: str) -> "Length":
        """Read `"128"` or `"128+-64"`.

        Raises:
            ValueError: The text is no such length; the message says what is allowed.
        """
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:(?:\+-|±)\s*(\d{1,9})\s*)?", text, re.ASCII)
        if match is None:
            raise ValueError(f"a length must be a number of tokens such as '128' or '128+-64', got {text!r}")
        return cls(int(match[1]), int(match[2] or 0))

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return rng.randint(self.mean - self.spread, self.mean + self.spread)

    def __str__(self) -> str:
        return f"{self.mean}+-{self.spread}" if self.spread else str(self.mean)


@dataclass(frozen=True, slots=True)
class ModeMix:
    """Share of each activation mode among the requests; modes with weight 0 are left out.

    Attributes:
        weights: (mode, weight > 0) in the order of `MODES`.
    """

    weights: tuple[tuple[str, float], ...] = (("silu", 1.0),)

    @classmethod
    def parse(cls, text: str) -> "ModeMix":
        """Read `"silu=1,stochastic=1,relu=2"`; a mode alone counts as weight 1.

        Raises:
            ValueError: The text is no such mix; the message says what is allowed.
        """
        weights: dict[str, float] = {}
        for item in text.split(","):
            name, _, value = (part.strip() for part in item.partition("="))
            if name not in MODES or name in weights:
                raise ValueError(f"a mode mix names each of {', '.join(MODES)} at most once, got {text!r}")
            try:
                weights[name] = float(value) if "=" in item else 1.0
            except ValueError:
                raise ValueError(f"the weight of '{name}' must be a number, got {value!r}") from None
            if not math.isfinite(weights[name]) or weights[name] < 0:
                raise ValueError(f"the weight of '{name}' must be at least 0 and finite, got {value!r}")
        mix = tuple((mode, weights[mode]) for mode in MODES if weights.get(mode, 0) > 0)
        if not mix:
            raise ValueError(f"a mode mix needs one weight above 0, got {text!r}")
        return cls(mix)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that occur."""
        return tuple(mode for mode, _ in self.weights)

    def assign(self, count: int, rng: random.Random) -> list[str]:
        """Modes of `count` requests in random order, each mode's share exact to within one request."""
        total = sum(weight for _, weight in self.weights)
        shares = {mode: count * weight / total for mode, weight in self.weights}
        counts = {mode: math.floor(share) for mode, share in shares.items()}
        by_remainder = sorted(shares, key=lambda mode: counts[mode] - shares[mode])
        for mode in by_remainder[: count - sum(counts.values())]:
            counts[mode] += 1
        assigned = [mode for mode, times in counts.items() for _ in range(times)]
        rng.shuffle(assigned)
        return assigned

    def __str__(self) -> str:
        return ",".join(f"{mode}={weight:g}" for mode, weight in self.weights)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is known about the tokenizer.

    Attributes:
        words: Words that are one token each after a space.
        base_tokens: Tokens of a prompt that is `FIRST_WORD` alone, chat template and special tokens included.
        exact: Whether the two above were measured, not assumed.
    """

    words: tuple[str, ...] = WORDS
    base_tokens: int = 1
    exact: bool = False

    @classmethod
    def from_counts(cls, base_tokens: int, added: Mapping[str, int]) -> "Vocabulary":
        """From the tokens of `FIRST_WORD` alone and the tokens that each word adds when it follows."""
        words = tuple(word for word in WORDS if added.get(word) == 1)
        if len(words) < MIN_WORDS:
            return cls(base_tokens=base_tokens)
        return cls(words, base_tokens, exact=True)

    def text(self, tokens: int, rng: random.Random) -> str:
        """A random text of `tokens` tokens after a space; begins with that space."""
        return "".join(f" {word}" for word in rng.choices(self.words, k=tokens))


@dataclass(frozen=True, slots=True)
class Workload:
    """Settings that define the requests.

    Attributes:
        request_rate: Mean arrivals per second (Poisson process); `math.inf` sends as fast as concurrency allows.
        shared_prefix_tokens: This many tokens at the beginning are the same in all prompts.
    """

    num_requests: int
    prompt_tokens: Length
    output_tokens: Length
    mode_mix: ModeMix = ModeMix()
    request_rate: float = math.inf
    shared_prefix_tokens: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise ValueError(f"the number of requests must be at least 1, got {self.num_requests}")
        if not self.request_rate > 0:
            raise ValueError(f"the request rate must be above 0, got {self.request_rate:g}")
        if not 0 <= self.shared_prefix_tokens < self.prompt_tokens.mean - self.prompt_tokens.spread:
            raise ValueError(
                f"the shared prefix must be shorter than the shortest prompt, got {self.shared_prefix_tokens} tokens "
                f"for prompts of {self.prompt_tokens}"
            )


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request to send. `arrival` is in seconds after the start."""

    arrival: float
    mode: str
    prompt: str
    max_tokens: int
    seed: int


def plan_requests(workload: Workload, vocabulary: Vocabulary, phase: str = "measured") -> list[PlannedRequest]:
    """The requests of a workload, ordered by arrival.

    Args:
        workload: The settings.
        vocabulary: What is known about the tokenizer.
        phase: Phases (warm-up, measured) share the prefix and nothing else.
    """
    prefix = vocabulary.text(workload.shared_prefix_tokens, random.Random(f"{workload.seed}/prefix"))
    rng = random.Random(f"{workload.seed}/{phase}")
    words = random.Random(f"{workload.seed}/{phase}/words")  # of its own: the rest is the same for every tokenizer
    requests = []
    arrival = 0.0
    for mode in workload.mode_mix.assign(workload.num_requests, rng):
        length = workload.prompt_tokens.draw(rng) - vocabulary.base_tokens - workload.shared_prefix_tokens
        prompt = FIRST_WORD + prefix + vocabulary.text(max(length, 0), words)
        requests.append(PlannedRequest(arrival, mode, prompt, workload.output_tokens.draw(rng), rng.getrandbits(31)))
        if math.isfinite(workload.request_rate):
            arrival += rng.expovariate(workload.request_rate)
    return requests
