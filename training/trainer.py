"""The training loop. Every random choice is a function of seed and step, so a killed run goes on to the same result."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.activation import ActivationControl, install
from training.checkpointing import load_state, restore, save_state
from training.config import Method, TuneConfig
from training.errors import Diverged
from training.log import Measurement, RunLog, StepRecord
from training.models import TrainedModel, forward_logits, load_model
from training.objective import losses
from training.schedule import learning_rate_share
from training.text import TextMixture, TokenizedText

BETAS = (0.9, 0.98)
EVAL_BATCH = 8
MEASURED = {"silu": 1.0, "p=0.7": 0.7, "p=0.5": 0.5, "p=0.3": 0.3, "relu": 0.0}  # p of each measured activation


@dataclass(frozen=True, slots=True)
class Text:
    """What a run reads.

    Attributes:
        mixture: Batches to train on.
        held_out: Texts to measure on, by name.
        fingerprint: Changes when the batches change.
    """

    mixture: TextMixture
    held_out: Mapping[str, TokenizedText]
    fingerprint: str


class Trainer:
    """One run.

    Args:
        config: Its settings.
        read_text: Called with transformers' tokenizer; reads and tokenizes the text.
        progress: Called with a line of text before each long step.

    Raises:
        ResumeError: The output folder holds a run with other settings.
        TrainingError: Model or text cannot be used.
    """

    def __init__(self, config: TuneConfig, read_text: Callable[[Any], Text], progress: Callable[[str], None]) -> None:
        self.config = config
        self.loaded: TrainedModel = load_model(config, progress)
        self.control: ActivationControl = install(self.loaded.model, config.positive_branch)
        self._text = read_text(self.loaded.tokenizer)
        self._fingerprint = _fingerprint(config, self._text.fingerprint)
        self._weights = self.loaded.trainable()
        self._optimizer = torch.optim.AdamW(_groups(self._weights, config.weight_decay), betas=BETAS)
        state = load_state(config.output, self._fingerprint)
        self.step = 0
        if state is not None:
            restore(state, self._weights, self._optimizer)
            self.step = state.step
            progress(f"Going on after step {self.step}")
        self.log = RunLog(config.output, self.step)

    @property
    def num_trained(self) -> int:
        """Number of trained weights."""
        return sum(weight.numel() for weight in self._weights.values())

    def run(self) -> Iterator[StepRecord]:
        """Train to the end; each step's record is handed out when its state and log are on disk.

        Raises:
            Diverged: The loss is not finite any more; what is on disk is from before.
        """
        config = self.config
        if not self.log.measurements and self._text.held_out:
            self.log.measurement(self.measure())
        while self.step < config.steps:
            record = self._train_step(self.step)
            self.step += 1
            self.log.step(record)
            last = self.step == config.steps
            if self._text.held_out and (last or (config.eval_every and self.step % config.eval_every == 0)):
                self.log.measurement(self.measure())
            if last or self.step % config.save_every == 0:
                save_state(config.output, self._fingerprint, self.step, self._weights, self._optimizer)
            yield record

    @torch.no_grad()
    def measure(self) -> Measurement:
        """Perplexity of the held-out texts by activation, and zeros in RELU mode."""
        perplexity: dict[str, dict[str, float]] = {}
        self.control.reset_counts()
        for name, text in self._text.held_out.items():
            windows = held_out_windows(text, self.config.eval_tokens, self.config.sequence_length)
            perplexity[name] = {
                activation: math.exp(self._next_token_loss(windows, p)) for activation, p in MEASURED.items()
            }
        zeros = (self.control.zeros.cpu() / self.control.elements).tolist()
        return Measurement(self.step, perplexity, zeros)

    def _next_token_loss(self, windows: Tensor, p: float) -> float:
        total = 0.0
        for start in range(0, len(windows), EVAL_BATCH):
            batch = windows[start : start + EVAL_BATCH].to(self.config.device)
            rows = None if p == 1 else torch.full((len(batch),), p)
            with self._autocast(), self.control.running(rows, seed=start):
                logits = forward_logits(self.loaded.model, batch)
            total += losses(logits, batch, None, 0.0).next_token.item() * len(batch)
        return total / len(windows)

    def _train_step(self, step: int) -> StepRecord:
        config = self.config
        started = time.perf_counter()
        share = learning_rate_share(step, config.steps, config.warmup_steps, config.min_learning_rate_share)
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * share
        token_ids = self._text.mixture.batch(step, config.batch_size, config.sequence_length)
        p = torch.from_numpy(self.draw_p(step))
        self.control.reset_counts()
        sums = torch.zeros(3)
        micro = config.micro_batch_size or config.batch_size
        self._optimizer.zero_grad()
        for part, start in enumerate(range(0, config.batch_size, micro)):
            rows = slice(start, start + micro)
            sums += self._backward(token_ids[rows], p[rows], seed=(config.seed * 1_000_003 + step) * 1009 + part)
        gradient_norm = torch.nn.utils.clip_grad_norm_(list(self._weights.values()), config.max_grad_norm)
        loss, next_token, distillation = sums.tolist()
        if not (math.isfinite(loss) and bool(torch.isfinite(gradient_norm))):
            raise Diverged(f"loss or gradient of step {step + 1} is not finite; lower the learning rate and start anew")
        self._optimizer.step()
        elements = self.control.elements.sum().item()
        return StepRecord(
            step=step + 1,
            tokens=(step + 1) * config.batch_size * config.sequence_length,
            loss=loss,
            next_token=next_token,
            distillation=distillation,
            zeros=self.control.zeros.sum().item() / elements if elements else math.nan,
            gradient_norm=float(gradient_norm),
            learning_rate=config.learning_rate * share,
            seconds=time.perf_counter() - started,
        )

    def draw_p(self, step: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """p of each sequence of a step: 1 is SILU, 0 is RELU."""
        config = self.config
        if step >= config.relu_from:
            return np.zeros(config.batch_size, np.float32)
        if config.method is Method.SWI_FT:
            return np.ones(config.batch_size, np.float32)
        rng = np.random.default_rng((config.seed, step, 1))
        return config.p.draw(step / max(config.relu_from - 1, 1), config.batch_size, rng)

    def _backward(self, token_ids: Tensor, p: Tensor, seed: int) -> Tensor:
        """Add the gradient of a part of the batch; returns its share of (loss, next token, distillation)."""
        config = self.config
        share = len(token_ids) / config.batch_size
        token_ids = token_ids.to(config.device)
        teacher_logits = None
        with self._autocast():
            if self.loaded.teacher is not None:
                with torch.no_grad():
                    teacher_logits = forward_logits(self.loaded.teacher, token_ids)
            with self.control.running(p, seed, config.gate_l1 * share):
                logits = forward_logits(self.loaded.model, token_ids)
                result = losses(logits, token_ids, teacher_logits, config.distillation)
                (result.total * share).backward()  # type: ignore[no-untyped-call]
        divergence = math.nan if result.distillation is None else result.distillation.item()
        return torch.tensor([result.total.item(), result.next_token.item(), divergence]) * share

    def _autocast(self) -> Any:
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.config.device, torch.bfloat16)


def held_out_windows(text: TokenizedText, num_tokens: int, length: int) -> Tensor:
    """int64 [windows, length]: evenly spaced over the text, without overlap; `num_tokens` in all, or what it has."""
    length = min(length, len(text))
    count = max(1, min(num_tokens, len(text)) // length)
    starts = np.linspace(0, len(text) - length, count).astype(int)
    return torch.from_numpy(np.stack([text.token_ids[start : start + length].astype(np.int64) for start in starts]))


def _groups(weights: Mapping[str, Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Norms and biases do not decay."""
    matrices = [weight for weight in weights.values() if weight.ndim >= 2]
    vectors = [weight for weight in weights.values() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _fingerprint(config: TuneConfig, text: str) -> str:
    """What a saved state depends on: not where it lies, nor how often it is saved or measured."""
    settings = replace(config, output=type(config.output)(), save_every=1, eval_every=0, eval_tokens=1).to_json()
    return hashlib.sha256((json.dumps(settings, default=str, sort_keys=True) + text).encode()).hexdigest()
