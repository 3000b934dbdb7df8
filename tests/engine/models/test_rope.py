import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.models.config import LinearRopeScaling, Llama3RopeScaling
from engine.models.rope import inverse_frequencies

LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(
    ("scaling", "rope"),
    [
        (None, {"rope_type": "default"}),
        (LinearRopeScaling(3.0), {"rope_type": "linear", "factor": 3.0}),
        (Llama3RopeScaling(32.0, 1.0, 4.0, 8192), {"rope_type": "llama3", **LLAMA3}),
    ],
)
def test_frequencies_equal_those_of_transformers(scaling, rope, head_dim, theta):
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **rope},
    )
    expected = LlamaRotaryEmbedding(config).inv_freq

    found = inverse_frequencies(head_dim, theta, scaling)

    assert found.dtype == torch.float32
    assert found.shape == (head_dim // 2,)
    assert torch.equal(found, expected)
