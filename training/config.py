"""What a training run is made from."""

import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from engine import PositiveBranch
from training.errors import InvalidTuneConfig
from training.schedule import Mixture, PSchedule

SEED_LIMIT = 2**63


class Method(StrEnum):
    """How a model is made good in RELU mode (arXiv 2509.22358, section 3)."""

    STOCHA = "stocha"  # stochastic activation, then RELU for the last share of the steps
    SWI_FT = "swi+ft"  # SILU, then RELU for the last share of the steps


class Trained(StrEnum):
    """Which weights a run changes."""

    LORA = "lora"  # low-rank changes of the feed-forward matrices; the result is an adapter
    FFN = "ffn"  # the feed-forward matrices
    ALL = "all"  # every weight


@dataclass(frozen=True, slots=True)
class TuneConfig:
    """Settings of one run. A run is a pure function of these, its text and the number of threads.

    Attributes:
        output: Folder for the result, the log and the state to resume from.
        model: Hugging Face folder or name, or GGUF file; None is the default model.
        method: See `Method`.
        p: Distribution of p over sequences and steps; of the method `stocha` only.
        alpha: Share of the steps, at the end, that run in RELU mode.
        distillation: Weight of the loss against the untouched model, in [0, 1]; the next token's loss has the rest.
        gate_l1: Weight of the L1 norm of act(gate) in sequences with RELU, which makes more gate values negative.
        positive_branch: What stochastic and RELU modes compute for gate values >= 0.
        trained: Which weights change.
        adapter: LoRA adapter to go on from, in `lora`; its rank and scale count, not those below.
        lora_rank: Rank of the changes in `lora`.
        lora_alpha: Changes are scaled by lora_alpha / lora_rank; None is the rank.
        learning_rate: At its peak; it warms up linearly and decays with a cosine to `min_learning_rate_share` of it.
        warmup_steps: Steps of the linear warm-up.
        steps: Optimiser steps.
        batch_size: Sequences of a step.
        micro_batch_size: Sequences that go through the model at once; gradients add up. None is all.
        sequence_length: Tokens of a sequence.
        max_grad_norm: Gradients are scaled down to this norm.
        weight_decay: AdamW's, on matrices.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        seed: Of text, activations and initial weights; at least 0.
        dtype: "bfloat16" (frozen weights and products; trained weights stay float32) or "float32".
        device: "cpu" or "cuda".
        from_scratch: Start from random weights of the checkpoint's configuration.
        eval_every: Steps between two measurements of perplexity on held-out text; 0 measures at the end only.
        eval_tokens: Held-out tokens of each text that a measurement reads.
        save_every: Steps between two saves of the state that a killed run goes on from.

    Raises:
        InvalidTuneConfig: A value is out of range or contradicts another.
    """

    output: Path
    model: str | None = None
    method: Method = Method.STOCHA
    p: PSchedule = field(default_factory=lambda: Mixture(relu=0.45, silu=0.3, uniform=0.25))
    alpha: float = 0.0
    distillation: float = 1.0
    gate_l1: float = 0.0
    positive_branch: PositiveBranch = PositiveBranch.SILU
    trained: Trained = Trained.LORA
    adapter: Path | None = None
    lora_rank: int = 64
    lora_alpha: float | None = None
    learning_rate: float = 1e-3
    min_learning_rate_share: float = 0.02
    warmup_steps: int = 10
    steps: int = 1000
    batch_size: int = 8
    micro_batch_size: int | None = None
    sequence_length: int = 256
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    gradient_checkpointing: bool = False
    seed: int = 0
    dtype: str = "bfloat16"
    device: str = "cpu"
    from_scratch: bool = False
    eval_every: int = 100
    eval_tokens: int = 2048
    save_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lora_rank", "save_every", "eval_tokens"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.sequence_length >= 2, "sequence_length", "at least 2", self.sequence_length)
        for name in ("alpha", "distillation", "min_learning_rate_share"):
            _require(0 <= getattr(self, name) <= 1, name, "in [0, 1]", getattr(self, name))
        for name in ("gate_l1", "weight_decay", "warmup_steps", "eval_every"):
            _require(0 <= getattr(self, name) < math.inf, name, "at least 0", getattr(self, name))
        for name in ("learning_rate", "max_grad_norm"):
            _require(0 < getattr(self, name) < math.inf, name, "above 0", getattr(self, name))
        alpha = self.lora_alpha
        _require(alpha is None or 0 < alpha < math.inf, "lora_alpha", "above 0", alpha)
        _require(0 <= self.seed < SEED_LIMIT, "seed", f"at least 0 and below {SEED_LIMIT}", self.seed)
        micro = self.micro_batch_size
        _require(
            micro is None or (micro >= 1 and self.batch_size % micro == 0),
            "micro_batch_size",
            f"a divisor of batch_size ({self.batch_size})",
            micro,
        )
        _require(self.dtype in ("bfloat16", "float32"), "dtype", "'bfloat16' or 'float32'", self.dtype)
        _require(self.device in ("cpu", "cuda"), "device", "'cpu' or 'cuda'", self.device)
        if self.adapter is not None:
            _require(self.trained is Trained.LORA, "trained", "'lora' to go on from an adapter", str(self.trained))
        if self.from_scratch:
            _require(self.trained is Trained.ALL, "trained", "'all' for a model from scratch", str(self.trained))
            _require(self.distillation == 0, "distillation", "0 for a model from scratch", self.distillation)

    def to_json(self) -> dict[str, Any]:
        """All settings by name; paths are left as they are."""
        return {**asdict(self), "p": repr(self.p)}

    @property
    def relu_from(self) -> int:
        """The first step that runs in RELU mode alone."""
        return self.steps - round(self.alpha * self.steps)


def _require(holds: bool, name: str, allowed: str, value: object) -> None:
    if not holds:
        raise InvalidTuneConfig(f"{name} must be {allowed}, got {value!r}", name)
