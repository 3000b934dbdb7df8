"""The supported families, read from a Hugging Face `config.json`.

One small function each, in the same order, so that any two can be diffed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError, UnsupportedArchitecture
from engine.models.config import DecoderConfig, LinearRopeScaling, Llama3RopeScaling

SLIDING, FULL = "sliding_attention", "full_attention"


def llama(hf: Any) -> DecoderConfig:
    """Llama, and what shares its architecture, such as SmolLM2."""
    _refuse_mlp_bias(hf)
    return replace(_shape(hf), qkv_bias=hf.attention_bias, o_bias=hf.attention_bias)


def mistral(hf: Any) -> DecoderConfig:
    """Llama with one sliding window for all layers."""
    if getattr(hf, "layer_types", None) is not None:
        raise UnsupportedArchitecture("Mistral with 'layer_types' is not supported, one window for all layers is")
    shape = _shape(hf)
    return replace(shape, sliding_window=(hf.sliding_window,) * shape.num_layers)


def qwen2(hf: Any) -> DecoderConfig:
    """Biases on queries, keys and values; a sliding window in some layers."""
    shape = _shape(hf)
    return replace(shape, qkv_bias=True, sliding_window=_windows(hf, shape.num_layers))


def qwen3(hf: Any) -> DecoderConfig:
    """Normalised queries and keys; a sliding window in some layers."""
    shape = _shape(hf)
    return replace(
        shape,
        qk_norm=True,
        qkv_bias=hf.attention_bias,
        o_bias=hf.attention_bias,
        sliding_window=_windows(hf, shape.num_layers),
    )


def smollm3(hf: Any) -> DecoderConfig:
    """No rotation in some layers; a sliding window in some layers."""
    _refuse_mlp_bias(hf)
    shape = _shape(hf)
    rotated = hf.no_rope_layers  # misnamed: 1 where the layer rotates
    if len(rotated) < shape.num_layers:
        raise ModelLoadError(f"no_rope_layers has {len(rotated)} entries for {shape.num_layers} layers")
    return replace(
        shape,
        use_rope=tuple(bool(flag) for flag in rotated[: shape.num_layers]),
        qkv_bias=hf.attention_bias,
        o_bias=hf.attention_bias,
        sliding_window=_windows(hf, shape.num_layers),
    )


@dataclass(frozen=True, slots=True)
class Family:
    """How to read one architecture's configuration, and the `model_type` that goes with it."""

    model_type: str
    read: Callable[[Any], DecoderConfig]


FAMILIES = {
    "LlamaForCausalLM": Family("llama", llama),
    "MistralForCausalLM": Family("mistral", mistral),
    "Qwen2ForCausalLM": Family("qwen2", qwen2),
    "Qwen3ForCausalLM": Family("qwen3", qwen3),
    "SmolLM3ForCausalLM": Family("smollm3", smollm3),
}


def read_config(path: Path) -> DecoderConfig:
    """Read a `config.json`, written by transformers 4 or 5.

    Raises:
        UnsupportedArchitecture: The architecture or a feature of it is not implemented; the message names it.
        ModelLoadError: The file is malformed or inconsistent.
    """
    raw = read_json(path)
    try:
        family = _family(raw)
        if raw.get("quantization_config") is not None:
            raise UnsupportedArchitecture(
                "'quantization_config': quantised safetensors are not supported; unquantised ones and GGUF are"
            )
        config = family.read(_defaults_filled_in(path))
    except UnsupportedArchitecture as error:
        raise UnsupportedArchitecture(f"{path}: {error}") from error
    except (ModelLoadError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{path}: {error}") from error
    check_config(config, path)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelLoadError: The file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def check_config(config: DecoderConfig, path: Path) -> None:
    """Check what every family takes for granted.

    Raises:
        ModelLoadError: A size is impossible.
    """
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    for name in (*sizes, "max_position"):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelLoadError(f"{path}: {name} must be a positive integer, got {value!r}")
    if config.num_heads % config.num_kv_heads:
        raise ModelLoadError(
            f"{path}: {config.num_heads} heads cannot share {config.num_kv_heads} key-value heads evenly"
        )
    if config.head_dim % 2:
        raise ModelLoadError(f"{path}: head_dim must be even to be rotated, got {config.head_dim}")
    if not config.norm_eps > 0 or not config.rope_theta > 0:
        raise ModelLoadError(f"{path}: norm_eps and rope_theta must be positive")
    for window in config.sliding_window:
        if window is not None and window < 1:
            raise ModelLoadError(f"{path}: sliding_window must be at least 1, got {window}")


def _family(raw: dict[str, Any]) -> Family:
    architectures = raw.get("architectures") or []
    name = architectures[0] if len(architectures) == 1 else None
    if name not in FAMILIES:
        what = f"architecture '{name}'" if name else f"'architectures' = {architectures!r}"
        raise UnsupportedArchitecture(f"{what} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    if raw.get("model_type") != family.model_type:
        raise UnsupportedArchitecture(
            f"{name} with model_type {raw.get('model_type')!r} is not supported, '{family.model_type}' is"
        )
    return family


def _defaults_filled_in(path: Path) -> Any:
    """transformers knows what a key that is left out means, and the spellings of its older versions."""
    from transformers import AutoConfig  # takes 2 s to import, and GGUF files do without

    try:
        return AutoConfig.from_pretrained(path.parent, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # its validators raise many unrelated classes
        raise ModelLoadError(str(error)) from error


def _shape(hf: Any) -> DecoderConfig:
    """What all families have in common."""
    if hf.hidden_act not in ("silu", "swish"):
        raise UnsupportedArchitecture(f"hidden_act '{hf.hidden_act}' is not supported, 'silu' is")
    return DecoderConfig(
        architecture=hf.architectures[0],
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        norm_eps=hf.rms_norm_eps,
        rope_theta=float(hf.rope_parameters["rope_theta"]),
        rope_scaling=_rope_scaling(hf.rope_parameters),
        max_position=hf.max_position_embeddings,
        tie_embeddings=hf.tie_word_embeddings,
        sliding_window=(None,) * hf.num_hidden_layers,
        use_rope=(True,) * hf.num_hidden_layers,
    )


def _rope_scaling(rope: dict[str, Any]) -> Llama3RopeScaling | LinearRopeScaling | None:
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedArchitecture("'partial_rotary_factor' is not supported; whole heads are rotated")
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "linear":
        return LinearRopeScaling(_positive(rope, "factor"))
    if kind == "llama3":
        return Llama3RopeScaling(
            factor=_positive(rope, "factor"),
            low_freq_factor=_positive(rope, "low_freq_factor"),
            high_freq_factor=_positive(rope, "high_freq_factor"),
            original_max_position=int(_positive(rope, "original_max_position_embeddings")),
        )
    raise UnsupportedArchitecture(f"rope_type '{kind}' is not supported; supported: default, linear, llama3")


def _positive(rope: dict[str, Any], key: str) -> float:
    value = rope.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ModelLoadError(f"rope scaling of type '{rope['rope_type']}' needs a positive '{key}', got {value!r}")
    return float(value)


def _windows(hf: Any, num_layers: int) -> tuple[int | None, ...]:
    kinds = hf.layer_types
    if len(kinds) != num_layers:
        raise ModelLoadError(f"layer_types has {len(kinds)} entries for {num_layers} layers")
    for kind in kinds:
        if kind not in (SLIDING, FULL):
            raise UnsupportedArchitecture(f"layer type '{kind}' is not supported; supported: {FULL}, {SLIDING}")
    if not hf.use_sliding_window:
        return (None,) * num_layers
    return tuple(hf.sliding_window if kind == SLIDING else None for kind in kinds)


def _refuse_mlp_bias(hf: Any) -> None:
    if hf.mlp_bias:
        raise UnsupportedArchitecture("'mlp_bias' is not supported; feed-forward layers have no biases")
