"""Configuration and tensors of a GGUF file, in the terms of Hugging Face's Llama."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import numpy as np
import torch
from gguf import quants
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import ModelLoadError, UnsupportedArchitecture
from engine.models.architectures import check_config
from engine.models.config import DecoderConfig, LinearRopeScaling
from engine.models.gguf_file import GgufFile, GgufTensor
from engine.models.rope import inverse_frequencies
from engine.models.weights import EMBEDDING, FINAL_NORM, LM_HEAD

T = TypeVar("T", int, float, str)

QUANTIZATIONS: Final = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "F16", "BF16", "F32")
ROPE_FACTORS: Final = "rope_freqs.weight"  # Llama 3's scaling, worked out by the converter: divisors of the frequencies
CHUNK_ELEMENTS: Final = 2**17  # dequantised at a time: what lies between the steps of it stays in the caches

_TOP_LEVEL: Final = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": LM_HEAD}
_LAYER_MODULES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufSource:
    """All tensors of a GGUF file, a `TensorSource`.

    Args:
        file: The file.
        config: Its configuration, from `read_gguf_config`.

    Raises:
        UnsupportedArchitecture: A tensor is in a format that is not supported.
    """

    def __init__(self, file: GgufFile, config: DecoderConfig) -> None:
        self._path = file.path
        self._tensors = {_hf_name(name): tensor for name, tensor in file.tensors.items() if name != ROPE_FACTORS}
        self.names = frozenset(self._tensors)
        self._interleaved_heads: dict[str, int] = {}
        if _family(file).interleaved:
            self._interleaved_heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
        for name, tensor in self._tensors.items():
            if tensor.quantization.name not in QUANTIZATIONS:
                raise UnsupportedArchitecture(
                    f"{self.label(name)} has format {tensor.quantization.name}; supported: {', '.join(QUANTIZATIONS)}"
                )

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""
        return self._tensors[name].shape

    def label(self, name: str) -> str:
        """See `TensorSource`."""
        stored = self._tensors[name].name if name in self._tensors else _gguf_name(name)
        return f"tensor '{stored}' in {self._path}"

    def copy_into(self, name: str, destination: Tensor) -> None:
        """See `TensorSource`."""
        tensor = self._tensors[name]
        heads = self._interleaved_heads.get(name.split(".")[-2])
        # Rows are reordered while they are still quantised: the blocks of a format never span rows.
        if tensor.data.ndim == 1:
            values = _dequantize(tensor, tensor.data)
            destination.copy_(values if heads is None else values[_halves_from_pairs(heads, len(values))])
            return
        rows = tensor.data if heads is None else tensor.data[_halves_from_pairs(heads, len(tensor.data))]
        step = max(1, CHUNK_ELEMENTS // tensor.shape[-1])
        for start in range(0, len(rows), step):
            values = _dequantize(tensor, rows[start : start + step])
            destination[start : start + step].copy_(values)


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """How to complete the configuration of one `general.architecture`.

    `interleaved` says that converters reorder the rows of queries and keys, so that a rotated pair is two neighbours.
    """

    interleaved: bool
    complete: Callable[[DecoderConfig], DecoderConfig]


def _llama(config: DecoderConfig) -> DecoderConfig:
    if any(config.sliding_window):
        return replace(config, architecture="MistralForCausalLM")
    return replace(config, architecture="LlamaForCausalLM")


def _qwen2(config: DecoderConfig) -> DecoderConfig:
    return replace(config, architecture="Qwen2ForCausalLM", qkv_bias=True)


def _qwen3(config: DecoderConfig) -> DecoderConfig:
    return replace(config, architecture="Qwen3ForCausalLM", qk_norm=True)


def _smollm3(config: DecoderConfig) -> DecoderConfig:
    # The format has no key for the layers without rotation; every fourth is what SmolLM3 and llama.cpp have.
    use_rope = tuple((index + 1) % 4 != 0 for index in range(config.num_layers))
    return replace(config, architecture="SmolLM3ForCausalLM", use_rope=use_rope)


GGUF_FAMILIES: Final = {
    "llama": GgufFamily(True, _llama),
    "qwen2": GgufFamily(False, _qwen2),
    "qwen3": GgufFamily(False, _qwen3),
    "smollm3": GgufFamily(True, _smollm3),
}


def read_gguf_config(file: GgufFile) -> DecoderConfig:
    """The configuration that a GGUF file's metadata describes.

    `rope_scaling` does not show Llama 3's scaling, of which the file has only the result: see `gguf_inv_freq`.

    Raises:
        UnsupportedArchitecture: The architecture or a feature of it is not implemented; the message names it.
        ModelLoadError: A key is missing or impossible.
    """
    family = _family(file)
    keys = _Keys(file)
    num_layers = keys.require("block_count", int)
    if num_layers > len(file.tensors):  # before anything of that size is built
        raise ModelLoadError(f"{file.path}: {num_layers} layers in a file of {len(file.tensors)} tensors")
    num_heads = keys.require("attention.head_count", int)
    hidden_size = keys.require("embedding_length", int)
    head_dim = keys.get("attention.key_length", hidden_size // max(num_heads, 1))
    if keys.get("attention.value_length", head_dim) != head_dim:
        raise UnsupportedArchitecture(
            f"{file.path}: '{keys.prefix}attention.value_length' differs from the keys' length"
        )
    if keys.get("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedArchitecture(
            f"{file.path}: '{keys.prefix}rope.dimension_count' is not the head's length {head_dim}; "
            "whole heads are rotated"
        )
    if keys.get("expert_count", 0):
        raise UnsupportedArchitecture(
            f"{file.path}: mixtures of experts ('{keys.prefix}expert_count') are not supported"
        )
    if "token_embd.weight" not in file.tensors:
        raise ModelLoadError(f"missing tensor 'token_embd.weight' in {file.path}")
    config = family.complete(
        DecoderConfig(
            architecture="",
            vocab_size=file.tensors["token_embd.weight"].shape[0],
            hidden_size=hidden_size,
            intermediate_size=keys.require("feed_forward_length", int),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=keys.get("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            norm_eps=keys.require("attention.layer_norm_rms_epsilon", float),
            rope_theta=keys.get("rope.freq_base", 10000.0),
            rope_scaling=_rope_scaling(keys),
            max_position=keys.require("context_length", int),
            tie_embeddings="output.weight" not in file.tensors,
            sliding_window=_windows(keys, num_layers),
            use_rope=(True,) * num_layers,
            qkv_bias="blk.0.attn_q.bias" in file.tensors,
            o_bias="blk.0.attn_output.bias" in file.tensors,
        )
    )
    check_config(config, file.path)
    return config


def gguf_inv_freq(file: GgufFile, config: DecoderConfig) -> Tensor:
    """Inverse frequencies, float32 [head_dim / 2], with the divisors that the file gives for Llama 3's scaling.

    Raises:
        ModelLoadError: The divisors are malformed.
    """
    inv_freq = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    factors = file.tensors.get(ROPE_FACTORS)
    if factors is None:
        return inv_freq
    if factors.shape != tuple(inv_freq.shape) or factors.quantization.name != "F32":
        raise ModelLoadError(
            f"tensor '{ROPE_FACTORS}' in {file.path} must be F32 with shape {list(inv_freq.shape)}, "
            f"got {factors.quantization.name} with shape {list(factors.shape)}"
        )
    return inv_freq / _dequantize(factors, factors.data)


def gguf_eos_token_ids(file: GgufFile) -> tuple[int, ...]:
    """End-of-sequence and end-of-turn tokens."""
    ids = (file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot"))
    return tuple(dict.fromkeys(token_id for token_id in ids if isinstance(token_id, int)))


class _Keys:
    """Typed access to the metadata of the file's architecture."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.path = file.path
        self.prefix = f"{file.metadata['general.architecture']}."

    def get(self, key: str, default: T) -> T:
        """The value of `key`, which has the type of `default`."""
        value = self._file.metadata.get(self.prefix + key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # some converters list a size per layer even where all are alike
        if isinstance(value, list):
            raise UnsupportedArchitecture(f"{self.path}: '{self.prefix}{key}' differs between layers")
        if isinstance(default, float) and isinstance(value, int):
            value = float(value)
        if type(value) is not type(default):
            raise ModelLoadError(
                f"{self.path}: '{self.prefix}{key}' must be of type {type(default).__name__}, got {value!r}"
            )
        return value

    def require(self, key: str, kind: type[T]) -> T:
        """The value of a key that the file must have."""
        if self.prefix + key not in self._file.metadata:
            raise ModelLoadError(f"{self.path}: metadata key '{self.prefix}{key}' is missing")
        return self.get(key, kind())

    def flags(self, key: str) -> list[bool] | None:
        """The value of a key that holds one flag per layer; None if the file lacks it."""
        value = self._file.metadata.get(self.prefix + key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise UnsupportedArchitecture(f"{self.path}: '{self.prefix}{key}' must list one flag per layer")
        return [bool(flag) for flag in value]


def _family(file: GgufFile) -> GgufFamily:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in GGUF_FAMILIES:
        supported = ", ".join(GGUF_FAMILIES)
        raise UnsupportedArchitecture(f"{file.path}: architecture '{name}' is not supported; supported: {supported}")
    return GGUF_FAMILIES[name]


def _rope_scaling(keys: _Keys) -> LinearRopeScaling | None:
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0))
    kind = keys.get("rope.scaling.type", "linear")  # the format's default
    if kind not in ("none", "linear"):
        raise UnsupportedArchitecture(
            f"{keys.path}: rope scaling '{kind}' is not supported; supported: none, linear, llama3"
        )
    if kind == "none" or factor in (0.0, 1.0):
        return None
    return LinearRopeScaling(factor)


def _windows(keys: _Keys, num_layers: int) -> tuple[int | None, ...]:
    window = keys.get("attention.sliding_window", 0) or None
    slides = keys.flags("attention.sliding_window_pattern")
    if slides is None:
        return (window,) * num_layers
    if len(slides) != num_layers:
        raise ModelLoadError(
            f"{keys.path}: '{keys.prefix}attention.sliding_window_pattern' lists {len(slides)} of {num_layers} layers"
        )
    return tuple(window if slide else None for slide in slides)


def _hf_name(name: str) -> str:
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name]
    match name.split("."):
        case ["blk", layer, module, kind] if module in _LAYER_MODULES:
            return f"model.layers.{layer}.{_LAYER_MODULES[module]}.{kind}"
    return name


def _gguf_name(hf_name: str) -> str:
    for gguf_name, known in _TOP_LEVEL.items():
        if known == hf_name:
            return gguf_name
    for module, known in _LAYER_MODULES.items():
        middle = f".{known}."
        if middle in hf_name:
            layer, kind = hf_name.removeprefix("model.layers.").split(middle)
            return f"blk.{layer}.{module}.{kind}"
    return hf_name


def _halves_from_pairs(heads: int, rows: int) -> NDArray[np.int64]:
    """Where each row of a projection lies in the file: there pair `i` of a head is rows `2 i` and `2 i + 1`.

    Args:
        heads: Number of heads.
        rows: heads x head_dim.

    Returns:
        int64 [rows], an index that brings back Hugging Face's order: pair `i` is `i` and `i + head_dim / 2`.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)


def _dequantize(tensor: GgufTensor, rows: NDArray[np.uint8]) -> Tensor:
    # As one long row: gguf takes 16 rows at a time, which is too few of them to be worth a call where rows are short.
    values = quants.dequantize(rows.reshape(1, -1), tensor.quantization).reshape(*rows.shape[:-1], -1)
    return torch.from_numpy(np.require(values, requirements="W"))  # F32 comes back as a view of the read-only file
