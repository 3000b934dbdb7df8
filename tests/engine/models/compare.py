"""Compares loaded weights with the tensors of a transformers model."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.models import Checkpoint, DecoderConfig, DecoderWeights


def assert_same_weights(checkpoint: Checkpoint, model: PreTrainedModel, *, atol: float = 0.0) -> None:
    """Every tensor of `model` is where the engine expects it, and there is nothing else."""
    found = unfused(checkpoint.config, checkpoint.weights)
    expected = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        assert checkpoint.weights.lm_head is checkpoint.weights.embedding
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name].float(), tensor.float(), rtol=0.0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(
        checkpoint.weights.rope_inv_freq, model.model.rotary_emb.inv_freq.float(), rtol=1e-6, atol=0.0
    )


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Round the parameters; `model.to` would round the rotary frequencies as well."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def unfused(config: DecoderConfig, weights: DecoderWeights) -> dict[str, Tensor]:
    """The engine's weights under transformers' names."""
    tensors = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.final_norm,
        "lm_head.weight": weights.lm_head,
    }
    sizes = [config.q_size, config.kv_size, config.kv_size]
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        parts: dict[str, Tensor | None] = {
            "input_layernorm.weight": layer.input_norm,
            "post_attention_layernorm.weight": layer.post_norm,
            "self_attn.o_proj.weight": layer.o,
            "self_attn.o_proj.bias": layer.o_bias,
            "self_attn.q_norm.weight": layer.q_norm,
            "self_attn.k_norm.weight": layer.k_norm,
            "mlp.gate_proj.weight": layer.gate,
            "mlp.up_proj.weight": layer.up,
            "mlp.down_proj.weight": layer.down.T,
        }
        for kind, stacked in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
            if stacked is not None:
                for part, rows in zip("qkv", stacked.split(sizes), strict=True):
                    parts[f"self_attn.{part}_proj.{kind}"] = rows
        tensors |= {prefix + name: tensor for name, tensor in parts.items() if tensor is not None}
    return tensors
