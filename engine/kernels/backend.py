"""The narrow interface between the decoder and a device's kernels."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from engine.ffn_router import FfnCosts
from engine.kv_cache import KVCache
from engine.models.config import DecoderConfig, DecoderWeights
from engine.sparsity import SparsityCounters
from engine.step import StepInputs


class Backend(ABC):
    """Kernels of one device, bound to one model's weights and cache.

    Attributes:
        has_sparse_ffn: Whether `feed_forward` can skip zeros for the first `step.sparse_rows` rows.
    """

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, cache: KVCache) -> None:
        self.config = config
        self.weights = weights
        self.cache = cache
        self.sparsity = SparsityCounters(config.num_layers)

    @abstractmethod
    def begin(self, step: StepInputs) -> None:
        """Prepare what all layers of a step share."""

    @abstractmethod
    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of each row: float32 [rows, hidden] to the same in the type of `weight`."""

    @abstractmethod
    def attention(self, layer: int, x: Tensor, step: StepInputs) -> Tensor:
        """Attention block of one layer, normalised input to output projection: [rows, hidden] to [rows, hidden].

        Writes the rows' keys and values into the cache before any row attends.
        """

    @abstractmethod
    def feed_forward(self, layer: int, x: Tensor, step: StepInputs) -> Tensor:
        """Gated feed-forward of one layer: [rows, hidden] to [rows, hidden]. Counts its zeros."""

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Normalised hidden states [rows, hidden] to logits [rows, vocab]."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Name of the kernel behind each operation, for `siluette info`."""

    has_sparse_ffn = False

    def measure_ffn_costs(self) -> FfnCosts | None:
        """Time both paths of RELU rows; None where there is no sparse one."""
        return None


def rotary_angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles.

    Args:
        positions: int64 [rows].
        inv_freq: float32 [head_dim / 2].

    Returns:
        Two float32 tensors [rows, head_dim / 2].
    """
    angles = positions.to(torch.float32)[:, None] * inv_freq[None, :]
    return angles.cos(), angles.sin()
