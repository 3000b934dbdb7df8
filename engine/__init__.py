"""Siluette's decoding engine.

>>> from engine import LLM, SamplingParams, Activation
>>> LLM().generate(["Once"], SamplingParams(max_tokens=20), Activation("stochastic", p=0.8, seed=1))
"""

import os

# PyTorch's and Numba's threads take turns on the same cores. By default each waits for its next turn in a busy loop and
# slows down the other, four times on a machine with anything else to do. Must be set before either is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from engine.activation import Activation, ActivationMode, ActivationSupport, PositiveBranch, Scope
from engine.async_engine import AsyncEngine, RequestStream
from engine.config import DType, EngineConfig, FfnPath, KernelSet
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
from engine.outputs import FinishReason, PositionLogprobs, RequestOutput, SampleOutput, TokenLogprob
from engine.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "Activation",
    "ActivationMode",
    "ActivationSupport",
    "AsyncEngine",
    "ContextLengthExceeded",
    "DType",
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
    "ModelInfo",
    "ModelLoadError",
    "PositionLogprobs",
    "PositiveBranch",
    "RequestOutput",
    "RequestStream",
    "SampleOutput",
    "SamplingParams",
    "Scope",
    "TokenLogprob",
    "UnsupportedArchitecture",
    "UntunedActivation",
]
