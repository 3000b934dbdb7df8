"""The narrow interface between the runner and a device's kernels."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.activation import PositiveBranch
from engine.draw_counters import DrawCounters
from engine.ffn_router import FfnCosts
from engine.ffn_work import WeightSizes
from engine.kv_cache import KVCache
from engine.models.config import DecoderConfig, DecoderWeights
from engine.models.weights import tensors_of
from engine.sampler import SampledToken, Sampler, SamplingRow
from engine.scorer import score_tokens
from engine.sparsity import SparsityCounters
from engine.step import StepInputs


class Backend(ABC):
    """The Llama-family decoder on one device: its kernels, bound to one model's weights and cache.

    A stack of pre-norm attention and gated feed-forward layers; the KV cache is its only state. The residual stream is
    float32, for small contributions of late layers would drown in bfloat16.

    Attributes:
        sparsity: Counts of the feed-forward's zeros.
        draws: Counts of what stochastic rows drew.
        neurons_read: Neurons, over all layers, whose weights in `up` and `down` the last `forward` read; None where a
            backend does not skip any, or does not know.
        row_zeros: int64 [rows], values of act(gate) that are 0 in each row of the last `forward`, over all layers. Read
            it once the step's tokens are known: before, a device may still be counting.
    """

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, cache: KVCache) -> None:
        self.config = config
        self.weights = weights
        self.cache = cache
        self.sparsity = SparsityCounters(config.num_layers)
        self.draws = DrawCounters()
        self.neurons_read: int | None = None
        self.row_zeros = np.zeros(0, np.int64)
        self._sampler = Sampler()

    def prepare(self, positive_branch: PositiveBranch, *, may_skip: bool) -> None:  # noqa: B027  # most have nothing to
        """Do what would make the first steps slow. Called once, before the first step.

        Args:
            positive_branch: The checkpoint's.
            may_skip: Steps that skip zeros can come.
        """

    @abstractmethod
    def forward(self, step: StepInputs) -> Tensor:
        """Run the step's token rows through all layers. Writes their keys and values into the cache, counts zeros.

        Returns:
            Hidden states float32 [rows, hidden], for `logits` of those rows that need them; valid until the next call.
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [rows, hidden] of `forward` to logits [rows, vocab], valid until the next call."""

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Draw the next token of every row of logits, see `Sampler.sample`."""
        return self._sampler.sample(logits, rows)

    def score(self, logits: Tensor, token_ids: Tensor) -> NDArray[np.float32]:
        """Log-probability of one token per row of logits, see `engine.scorer.score_tokens`."""
        return score_tokens(logits, token_ids)

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return sum(tensor.nbytes for tensor in tensors_of(self.weights))

    @property
    def weight_sizes(self) -> WeightSizes:
        """Memory of the weights by how a step reads them."""
        stacked, weights = self.weights.stacked, self.weights
        parts = (getattr(stacked, name) for name in type(stacked).__slots__)
        neurons = self.config.num_layers * self.config.intermediate_size
        return WeightSizes(
            layers=sum(part.nbytes for part in parts if part is not None),
            neuron=(stacked.up.nbytes + stacked.down.nbytes) // neurons,
            head=weights.lm_head.nbytes + weights.final_norm.nbytes,
            embedding_row=weights.embedding[0].nbytes,
        )

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Name of the kernel behind each operation, for `siluette info`."""

    def pin_threads(self) -> bool:
        """Give each compute thread, the calling one among them, a core of its own; False where that is not done."""
        return False

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
