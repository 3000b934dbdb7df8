"""A request and the sequences it becomes."""

import secrets
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from engine.activation import Activation, ActivationMode, Scope
from engine.kv_cache import BLOCK_SIZE
from engine.logits import LogitEdits
from engine.philox import derive_key
from engine.sampling_params import SamplingParams

# Part of a cache key: how the tokens of a block were activated. None is SILU throughout.
Fingerprint = tuple[int, int, int, int] | None


@dataclass(frozen=True, slots=True)
class Request:
    """One request with every seed filled in.

    Attributes:
        seed: Sampling seed that was used.
        activation: With its seed, where it draws.
        max_tokens: Most tokens to generate, capped by the context.
        scores_prompt: The prompt's log-probabilities are wanted, and no text; `max_tokens` is 0.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    activation: Activation
    seed: int
    max_tokens: int
    scores_prompt: bool = False
    arrival: float = field(default_factory=time.monotonic)

    @classmethod
    def create(
        cls,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        sampling: SamplingParams,
        activation: Activation,
        max_model_len: int,
    ) -> "Request":
        """Fill in seeds and limits."""
        seed = sampling.seed if sampling.seed is not None else draw_seed()
        room = max_model_len - len(prompt_token_ids)
        max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        return cls(
            request_id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            sampling=replace(sampling, seed=seed),
            activation=activation.with_seed(seed),
            seed=seed,
            max_tokens=max_tokens,
        )

    @classmethod
    def scoring(cls, request_id: str, prompt_token_ids: SequenceOf[int], activation: Activation) -> "Request":
        """A request for the log-probabilities of a prompt's tokens."""
        seed = draw_seed()
        return cls(
            request_id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            sampling=SamplingParams(seed=seed),
            activation=activation.with_seed(seed),
            seed=seed,
            max_tokens=0,
            scores_prompt=True,
        )


def draw_seed() -> int:
    """A random seed that JavaScript clients can represent, too."""
    return secrets.randbits(53)


class Sequence:
    """One sample of a request on its way through the engine. The scheduler owns `block_ids` and `num_computed`.

    Args:
        request: The request.
        index: Which of its `n` samples this is.
        end_token_ids: Tokens that end the text.
    """

    __slots__ = (
        "activation_key",
        "block_ids",
        "cache_parent",
        "edits",
        "end_token_ids",
        "ffn_zeros",
        "first_active",
        "index",
        "num_cached",
        "num_computed",
        "num_registered",
        "queue_seconds",
        "request",
        "sampling_key",
        "threshold",
        "token_ids",
        "was_admitted",
    )

    def __init__(self, request: Request, index: int, end_token_ids: tuple[int, ...]) -> None:
        self.request = request
        self.index = index
        self.end_token_ids = end_token_ids
        self.token_ids: list[int] = list(request.prompt_token_ids)
        self.block_ids: list[int] = []
        self.num_computed = 0  # tokens whose keys and values are in the cache
        self.queue_seconds: float | None = None  # from the request's arrival to its first step; None until then
        self.was_admitted = False  # if only to be preempted later
        self.num_cached = 0  # of the prompt, taken from the prefix cache when it was first admitted
        self.ffn_zeros = 0  # of the rows that gave its tokens, over all layers
        self.num_registered = 0  # blocks the prefix cache knows
        self.cache_parent = 0  # its name for the last of them
        self.edits = LogitEdits(request.sampling, request.prompt_token_ids, end_token_ids)
        activation = request.activation
        self.threshold = activation.threshold
        self.sampling_key = derive_key(request.seed, index)
        drawing = activation.mode is ActivationMode.STOCHASTIC and activation.seed is not None
        self.activation_key = derive_key(activation.seed or 0, index) if drawing else (0, 0)
        # Position from which the activation applies; before it the tokens run with SILU.
        self.first_active = self.prompt_length if activation.scope is Scope.DECODE else 0

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_length

    def fingerprint(self, block: int) -> Fingerprint:
        """How the tokens of the sequence's block number `block` are activated.

        Two blocks with the same tokens, the same predecessors and the same fingerprints hold the same keys and values,
        to the last bit.
        """
        start = block * BLOCK_SIZE
        # By mode, not by threshold: p = 1 never draws a zero, and yet it takes the checkpoint's positive branch.
        if self.request.activation.mode is ActivationMode.SILU or start + BLOCK_SIZE <= self.first_active:
            return None
        inactive = max(0, self.first_active - start)
        return (self.threshold, *self.activation_key, inactive)
