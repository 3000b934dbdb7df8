"""Makers of tiny runs: a tiny model on disk, a text that it can learn, and a trainer of both."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tests.engine.models.tiny import FAMILIES, SHAPE, randomize
from training.config import TuneConfig
from training.schedule import Mixture
from training.text import TextMixture, TokenizedText
from training.trainer import Text, Trainer

MIXED = Mixture(relu=0.5, silu=0.25, uniform=0.25)
SETTINGS = TuneConfig(
    output=Path(),
    p=MIXED,
    alpha=0.4,
    distillation=0.0,
    lora_rank=4,
    learning_rate=1e-2,
    warmup_steps=2,
    steps=5,
    batch_size=4,
    sequence_length=16,
    eval_every=2,
    eval_tokens=32,
    save_every=2,
    dtype="float32",
)


def settings(model: Path, output: Path, **changes: Any) -> TuneConfig:
    """`SETTINGS` for a model, with changes."""
    return replace(SETTINGS, model=str(model), output=output, **changes)


def counting(length: int, period: int = 11) -> TokenizedText:
    """Tokens that go round in a circle: what comes next can be learnt."""
    return TokenizedText("counting", (np.arange(length) % period + 40).astype(np.uint32))


def read_text(tokenizer: Any) -> Text:
    """A text to train on and one to measure on; needs no tokenizer."""
    return Text(TextMixture([(counting(400), 1.0)], seed=3), {"held out": counting(64, period=7)}, "counting")


def trainer(config: TuneConfig) -> Trainer:
    """A trainer of `read_text` that says nothing."""
    return Trainer(config, read_text, progress=lambda line: None)


def trained_weights(run: Trainer) -> dict[str, Tensor]:
    """A copy of the weights that a run trains."""
    return {name: weight.detach().clone() for name, weight in run.loaded.trainable().items()}


def model_in_memory(family: str, **overrides: Any) -> Any:
    """A tiny model of `tests.engine.models.tiny`, not written to disk."""
    tiny = FAMILIES[family]
    model = tiny.model_class(tiny.config_class(**{**SHAPE, **tiny.settings, **overrides})).float().eval()
    randomize(model)
    return model
