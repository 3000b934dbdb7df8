"""Checkpoints of supported models, read into the layout that the engine computes with."""

from engine.models.checkpoint import Checkpoint, ModelLocation, SourceFormat, load_checkpoint, resolve_model
from engine.models.config import DecoderConfig, DecoderWeights, LayerWeights

__all__ = [
    "Checkpoint",
    "DecoderConfig",
    "DecoderWeights",
    "LayerWeights",
    "ModelLocation",
    "SourceFormat",
    "load_checkpoint",
    "resolve_model",
]
