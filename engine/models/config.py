"""The shape of a supported decoder, whatever family and file format it came from."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """Frequency-dependent scaling of Llama 3.1 (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class LinearRopeScaling:
    """Position interpolation (`rope_type: linear`): positions are divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A Llama-family decoder with a gated SILU feed-forward.

    Attributes:
        architecture: Hugging Face class name, such as `"LlamaForCausalLM"`.
        sliding_window: Per layer, how many most recent positions a token attends to (itself included); None for all.
        use_rope: Per layer, whether queries and keys are rotated (SmolLM3 leaves some layers without).
        qk_norm: RMSNorm over each head of queries and keys before the rotation (Qwen3).
        qkv_bias: Queries, keys and values have biases.
        o_bias: The attention's output projection has a bias.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | LinearRopeScaling | None
    max_position: int
    tie_embeddings: bool
    sliding_window: tuple[int | None, ...]
    use_rope: tuple[bool, ...]
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim


@dataclass(slots=True)
class LayerWeights:
    """Weights of one decoder layer, or of all of them stacked along a new first axis.

    Linear weights are [out, in]; feed-forward ones neuron-major.

    Attributes:
        qkv: [q_size + 2 * kv_size, hidden], queries, keys and values stacked; heads rotate by halves (Hugging Face
            convention), so GGUF's interleaved Llama weights are permuted back at load.
        down: [intermediate, hidden], stored transposed so that one neuron is one contiguous row.
    """

    input_norm: Tensor  # [hidden]
    qkv: Tensor
    qkv_bias: Tensor | None  # [q_size + 2 * kv_size]
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    o: Tensor  # [hidden, q_size]
    o_bias: Tensor | None  # [hidden]
    post_norm: Tensor  # [hidden]
    gate: Tensor  # [intermediate, hidden]
    up: Tensor  # [intermediate, hidden]
    down: Tensor


@dataclass(slots=True)
class DecoderWeights:
    """All weights. With tied embeddings `lm_head` is the very tensor of `embedding`."""

    embedding: Tensor  # [vocab, hidden]
    stacked: LayerWeights  # of all layers
    final_norm: Tensor  # [hidden]
    lm_head: Tensor  # [vocab, hidden]
    rope_inv_freq: Tensor  # float32 [head_dim / 2], scaling applied

    @property
    def layers(self) -> list[LayerWeights]:
        """Each layer's weights, views of the stacked ones."""
        parts = {name: getattr(self.stacked, name) for name in LayerWeights.__slots__}

        def layer(index: int) -> LayerWeights:
            views: dict[str, Any] = {name: None if part is None else part[index] for name, part in parts.items()}
            return LayerWeights(**views)

        return [layer(index) for index in range(len(self.stacked.gate))]
