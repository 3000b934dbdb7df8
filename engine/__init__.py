"""Siluette's decoding engine.

>>> from engine import LLM, SamplingParams, Activation
>>> LLM().generate(["Once"], SamplingParams(max_tokens=20), Activation("stochastic", p=0.8, seed=1))
"""

import os

# How long a compute thread waits for its next step in a busy loop before it sleeps (half a millisecond or so). OpenMP's
# own default is so long that anything else on the cores slows decoding down many times; to wake threads that sleep
# takes as long as a part of a step. Must be set before PyTorch and Numba are imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from engine.activation import Activation, ActivationMode, ActivationSupport, PositiveBranch, Scope
from engine.async_engine import AsyncEngine, RequestStream
from engine.config import Device, DType, EngineConfig, FfnPath, KernelSet, Quantization
from engine.errors import (
    ContextLengthExceeded,
    EngineError,
    EngineOverloaded,
    EngineStopped,
    InvalidConfig,
    InvalidRequest,
    ModelLoadError,
    UnsupportedArchitecture,
    UntunedActivation,
)
from engine.info import EngineStats, ModelInfo
from engine.llm import LLM
from engine.models.checkpoint import ModelLocation, SourceFormat, resolve_model
from engine.outputs import FinishReason, PositionLogprobs, PromptScore, RequestOutput, SampleOutput, TokenLogprob
from engine.quality import MeasuredQuality
from engine.sampling_params import SamplingParams
from engine.threads import use_threads

__all__ = [
    "LLM",
    "Activation",
    "ActivationMode",
    "ActivationSupport",
    "AsyncEngine",
    "ContextLengthExceeded",
    "DType",
    "Device",
    "EngineConfig",
    "EngineError",
    "EngineOverloaded",
    "EngineStats",
    "EngineStopped",
    "FfnPath",
    "FinishReason",
    "InvalidConfig",
    "InvalidRequest",
    "KernelSet",
    "MeasuredQuality",
    "ModelInfo",
    "ModelLoadError",
    "ModelLocation",
    "PositionLogprobs",
    "PositiveBranch",
    "PromptScore",
    "Quantization",
    "RequestOutput",
    "RequestStream",
    "SampleOutput",
    "SamplingParams",
    "Scope",
    "SourceFormat",
    "TokenLogprob",
    "UnsupportedArchitecture",
    "UntunedActivation",
    "resolve_model",
    "use_threads",
]
