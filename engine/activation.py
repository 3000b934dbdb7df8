"""The activation of a request: what it may say, what a checkpoint allows, and what it computes.

A gated feed-forward layer is `down(act(gate(x)) * up(x))`. In "Stochastic activations" (arXiv 2509.22358) `act` chooses
for each negative gate value between SILU, with probability `p`, and RELU, that is 0. This module is the definition:
every kernel is tested against `apply_activation`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

import torch
from torch import Tensor

from engine.errors import InvalidRequest, UntunedActivation
from engine.philox import STREAM_ACTIVATION, random_words
from engine.sampling_params import SEED_MAX, SEED_MIN, check_number

T = TypeVar("T", bound=StrEnum)

DEFAULT_P = 0.8
UNTUNED_MIN_P = 0.7  # an untuned model's perplexity rises by 40 % at p = 0.7 and nearly triples at 0.5
ALWAYS_SILU = 2**32  # threshold that every 32-bit word is below
NEVER_SILU = 0


class ActivationMode(StrEnum):
    """The three activations a request can choose between."""

    SILU = "silu"
    STOCHASTIC = "stochastic"
    RELU = "relu"


MODES = tuple(ActivationMode)  # the order is the code in `ActivationRows.mode` and in the kernels' counters
MODE_CODE = {mode: code for code, mode in enumerate(MODES)}


class Scope(StrEnum):
    """The tokens an activation applies to."""

    ALL = "all"
    DECODE = "decode"  # the prompt runs with SILU, so that samples share its keys and values


class PositiveBranch(StrEnum):
    """What stochastic and RELU modes compute for gate values >= 0; a property of the checkpoint, not of the request."""

    SILU = "silu"
    IDENTITY = "identity"


@dataclass(frozen=True, slots=True)
class Activation:
    """The activation of one request.

    Args:
        mode: `"silu"` is deterministic, `"stochastic"` draws, `"relu"` is sparse.
        p: Probability of SILU for a negative gate value, in [0, 1]; stochastic mode only, 0.8 if left out.
        seed: 64-bit seed of the draws; stochastic mode only. Falls back to the sampling seed, then to a random one.
        scope: `"all"` tokens, or `"decode"`: generated tokens only.

    Raises:
        InvalidRequest: A value is unknown, out of range or has no meaning in this mode.
    """

    mode: ActivationMode = ActivationMode.SILU
    p: float | None = None
    seed: int | None = None
    scope: Scope = Scope.ALL

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", _choice(ActivationMode, self.mode, "activation.mode"))
        object.__setattr__(self, "scope", _choice(Scope, self.scope, "activation.scope"))
        if self.mode is not ActivationMode.STOCHASTIC:
            for name in ("p", "seed"):
                if getattr(self, name) is not None:
                    raise InvalidRequest(
                        f"activation.{name} has a meaning in mode 'stochastic' only, not in '{self.mode}'",
                        f"activation.{name}",
                    )
            return
        p = DEFAULT_P if self.p is None else self.p
        check_number("activation.p", p, 0.0, 1.0)
        object.__setattr__(self, "p", float(p))
        seed = self.seed
        if seed is not None and (
            not isinstance(seed, int) or isinstance(seed, bool) or not SEED_MIN <= seed <= SEED_MAX
        ):
            raise InvalidRequest(f"activation.seed must be a 64-bit integer, got {seed!r}", "activation.seed")

    def with_seed(self, fallback: int) -> "Activation":
        """The same activation with its seed filled in; unchanged in modes that draw nothing."""
        if self.mode is ActivationMode.STOCHASTIC and self.seed is None:
            return replace(self, seed=fallback)
        return self

    @property
    def threshold(self) -> int:
        """A negative gate value goes through SILU when its 32-bit word is below this integer in [0, 2**32]."""
        if self.mode is ActivationMode.SILU:
            return ALWAYS_SILU
        if self.mode is ActivationMode.RELU:
            return NEVER_SILU
        assert self.p is not None
        return round(self.p * 2**32)


def _choice(kind: type[T], value: str, field: str) -> T:
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(f"'{item}'" for item in kind)
        raise InvalidRequest(f"{field} must be one of {allowed}, got {value!r}", field) from None


@dataclass(frozen=True, slots=True)
class ActivationSupport:
    """What a checkpoint was tuned for, as its metadata says."""

    modes: tuple[ActivationMode, ...] = (ActivationMode.SILU, ActivationMode.STOCHASTIC)
    min_p: float = UNTUNED_MIN_P
    max_p: float = 1.0
    positive_branch: PositiveBranch = PositiveBranch.SILU
    tuned: bool = False

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "ActivationSupport":
        """Read the `siluette.*` keys of a safetensors header; without them the checkpoint counts as untuned.

        Keys: `siluette.modes` ("silu,stochastic,relu"), `siluette.min_p`, `siluette.max_p`,
        `siluette.positive_branch` ("silu" or "identity").

        Raises:
            ValueError: A key has a value that it cannot have.
        """
        if "siluette.modes" not in metadata:
            return cls()
        modes = tuple(ActivationMode(name.strip()) for name in metadata["siluette.modes"].split(","))
        min_p, max_p = float(metadata.get("siluette.min_p", 0.0)), float(metadata.get("siluette.max_p", 1.0))
        if not 0 <= min_p <= max_p <= 1:
            raise ValueError(f"siluette.min_p and siluette.max_p must satisfy 0 <= {min_p} <= {max_p} <= 1")
        branch = PositiveBranch(metadata.get("siluette.positive_branch", PositiveBranch.SILU))
        return cls(modes, min_p, max_p, branch, tuned=True)

    def to_metadata(self) -> dict[str, str]:
        """The keys that `from_metadata` reads, as whoever tunes a checkpoint writes them."""
        entries = {"siluette.modes": ",".join(self.modes), "siluette.positive_branch": str(self.positive_branch)}
        if ActivationMode.STOCHASTIC in self.modes:
            entries |= {"siluette.min_p": str(self.min_p), "siluette.max_p": str(self.max_p)}
        return entries

    def check(self, activation: Activation) -> None:
        """Refuse an activation that the checkpoint was not tuned for.

        Raises:
            UntunedActivation: With what is supported and how to allow it anyway.
        """
        if activation.mode not in self.modes:
            field = "activation.mode"
            problem = f"activation mode '{activation.mode}'"
        elif activation.mode is ActivationMode.STOCHASTIC and not self.min_p <= (activation.p or 0.0) <= self.max_p:
            field = "activation.p"
            problem = f"activation p = {activation.p:g}"
        else:
            return
        raise UntunedActivation(
            f"this checkpoint was not tuned for {problem}; it supports {self.describe()}. "
            "Start the server with --allow-untuned-activations to use it anyway.",
            field,
        )

    def describe(self) -> str:
        """Supported modes in words, for error messages and `siluette info`."""
        ranges = {ActivationMode.STOCHASTIC: f" with p in [{self.min_p:g}, {self.max_p:g}]"}
        return ", ".join(f"'{mode}'{ranges.get(mode, '')}" for mode in self.modes)


@dataclass(frozen=True, slots=True)
class ActivationRows:
    """The activations of a step's token rows, as tensors: what kernels read.

    Attributes:
        mode: int64 [rows], index into `MODES`.
        threshold: int64 [rows], see `Activation.threshold`.
        keys: int64 [rows, 2], Philox key words.
        positions: int64 [rows], position of the token in its sequence.
        positive_branch: The checkpoint's.
    """

    mode: Tensor
    threshold: Tensor
    keys: Tensor
    positions: Tensor
    positive_branch: PositiveBranch


def apply_activation(gate: Tensor, rows: ActivationRows, layer: int) -> Tensor:
    """Activation of a step's gate values, each row in its own mode (arXiv 2509.22358, section 3).

    Args:
        gate: [rows, intermediate], any float type; computed in float32.
        rows: The rows' activations.
        layer: Decoder layer, part of the random counter.

    Returns:
        act(gate), shape and dtype of `gate`.
    """
    x = gate.float()
    silu = x * torch.sigmoid(x)
    words = random_words(rows.keys, rows.positions, layer, gate.shape[1], STREAM_ACTIVATION)
    negative = torch.where(words < rows.threshold[:, None], silu, 0.0)
    if rows.positive_branch is PositiveBranch.IDENTITY:
        plain_silu = (rows.mode == MODE_CODE[ActivationMode.SILU])[:, None]
        positive = torch.where(plain_silu, silu, x)
    else:
        positive = silu
    return torch.where(x < 0, negative, positive).to(gate.dtype)
