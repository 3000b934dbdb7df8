"""A tiny model that accepts every activation, and text without a meaning for it."""

from pathlib import Path

import torch

from engine import DType, EngineConfig
from evaluation.texts import TextWindows
from tests.engine.models.tiny import VOCAB_SIZE


def tiny_config(model: Path) -> EngineConfig:
    return EngineConfig(
        model=str(model), dtype=DType.FLOAT32, kv_cache_mib=8, threads=1, allow_untuned_activations=True
    )


def windows(*lengths: int) -> TextWindows:
    generator = torch.Generator().manual_seed(1)
    drawn = (torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths)
    return TextWindows("noise", tuple(map(tuple, drawn)))
