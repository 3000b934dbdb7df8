"""Writes tiny GGUF files from transformers models, as llama.cpp's converter lays them out."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Q
from gguf import quants
from torch import Tensor
from transformers import PreTrainedModel

from tests.engine.models.tiny import SPECIAL_TOKENS

Encoder = Callable[[np.ndarray, Q], np.ndarray]

INTERLEAVED = ("llama", "smollm3")


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    quantization: Q = Q.F32,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> dict[str, Tensor]:
    """Write `model` with its matrices quantised.

    Args:
        metadata: Keys to add or replace (int, float, str or list); a key whose value is None is left out.
        tensors: The same for tensors, float32.

    Returns:
        What the file's tensors stand for, dequantised by the `gguf` package, under transformers' names.
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    all_keys = {f"{architecture}.{key}": value for key, value in keys.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*SPECIAL_TOKENS, *(f"t{index}" for index in range(3, config.vocab_size))],
        "tokenizer.ggml.eos_token_id": 0,
    }
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (all_keys | dict(metadata or {})).items():
        _add(writer, key, value)

    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    meant: dict[str, Tensor] = {}
    extra = dict(tensors or {})
    for hf_name, parameter in model.state_dict().items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name is not None, hf_name
        heads = _interleaved_heads(config, architecture, hf_name)
        values = parameter.numpy() if heads is None else pairs_from_halves(parameter.numpy(), heads)
        kind = quantization if parameter.ndim == 2 else Q.F32
        raw = encode(values, kind)
        back = torch.from_numpy(quants.dequantize(raw, kind).copy()).reshape(parameter.shape)
        meant[hf_name] = back if heads is None else halves_from_pairs(back, heads)
        if name not in extra:
            writer.add_tensor(name, raw, raw_dtype=kind)
    for name, array in extra.items():
        if array is not None:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def encode(values: np.ndarray, kind: Q) -> np.ndarray:
    """Quantise; for Q4_K and Q6_K, which the `gguf` package can only read, draw random blocks of that format."""
    if kind not in (Q.Q4_K, Q.Q6_K):
        return quants.quantize(values, kind)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(values.size)
    blocks = random.integers(0, 256, (*values.shape[:-1], values.shape[-1] // block_size, block_bytes), dtype=np.uint8)
    scale_offsets = (0, 2) if kind == Q.Q4_K else (block_bytes - 2,)
    for offset in scale_offsets:  # the float16 scales must be finite and of a sane size
        scales = random.uniform(-0.01, 0.01, blocks.shape[:-1]).astype(np.float16)
        blocks[..., offset : offset + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def pairs_from_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of every head from (0, 1, 2, ...) to (0, d/2, 1, d/2 + 1, ...), one row at a time."""
    head_dim = len(values) // heads
    order = [
        h * head_dim + half * (head_dim // 2) + i for h in range(heads) for i in range(head_dim // 2) for half in (0, 1)
    ]
    return values[order]


def halves_from_pairs(values: Tensor, heads: int) -> Tensor:
    """The inverse of `pairs_from_halves`."""
    order = torch.from_numpy(pairs_from_halves(np.arange(len(values)), heads))
    back = torch.empty_like(values)
    back[order] = values
    return back


def _interleaved_heads(config: Any, architecture: str, hf_name: str) -> int | None:
    if architecture not in INTERLEAVED:
        return None
    if "q_proj" in hf_name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if "k_proj" in hf_name else None


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            return
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
