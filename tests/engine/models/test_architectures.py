import json
from pathlib import Path

import pytest
import torch

from engine.errors import ModelLoadError, UnsupportedArchitecture
from engine.models import DecoderConfig, load_checkpoint
from engine.models.architectures import FAMILIES, read_config
from engine.models.config import LinearRopeScaling, Llama3RopeScaling
from tests.engine.models.compare import assert_same_weights
from tests.engine.models.tiny import make_tiny


def edit_config(folder: Path, **changes) -> Path:
    """Change keys of config.json; a key whose value is ... is left out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return path


def config_of(family: str, folder: Path, **changes) -> DecoderConfig:
    make_tiny(family, folder)
    return read_config(edit_config(folder, **changes))


def test_the_sizes_are_read(tmp_path):
    config = config_of("llama-untied", tmp_path)

    assert config == DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position=256,
        tie_embeddings=False,
        sliding_window=(None, None, None),
        use_rope=(True, True, True),
    )


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama-llama3rope", "rope_scaling", Llama3RopeScaling(8.0, 1.0, 4.0, 64)),
        ("llama-linear", "rope_scaling", LinearRopeScaling(4.0)),
        ("llama-bias", "qkv_bias", True),
        ("llama-bias", "o_bias", True),
        ("mistral-swa", "sliding_window", (8, 8, 8)),
        ("qwen2", "qkv_bias", True),
        ("qwen2", "o_bias", False),
        ("qwen2", "sliding_window", (None, None, None)),
        ("qwen2-swa", "sliding_window", (None, 8, 8)),
        ("qwen3", "qk_norm", True),
        ("qwen3", "head_dim", 32),
        ("smollm2-tied", "tie_embeddings", True),
        ("smollm3", "use_rope", (True, False, True)),
        ("smollm3-swa", "sliding_window", (None, None, 8)),
        ("smollm3-swa", "architecture", "SmolLM3ForCausalLM"),
    ],
)
def test_what_sets_a_family_apart_is_read(family, field, value, tmp_path):
    assert getattr(config_of(family, tmp_path), field) == value


@pytest.mark.parametrize(
    ("family", "changes", "field", "value"),
    [
        (
            "qwen2-swa",
            {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            None,
            (8, None, None),
        ),
        ("qwen2-swa", {"use_sliding_window": False}, None, (None, None, None)),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "layer_types": ...},
            None,
            (None, None, 4),
        ),
        ("mistral-swa", {"sliding_window": None}, None, (None, None, None)),
        ("smollm3-swa", {"use_sliding_window": False}, None, (None, None, None)),
        ("smollm3", {"no_rope_layers": ..., "no_rope_layer_interval": 2}, "use_rope", (True, False, True)),
        ("smollm3", {"no_rope_layers": [0, 0, 1, 1, 1]}, "use_rope", (False, False, True)),
    ],
)
def test_layers_that_differ(family, changes, field, value, tmp_path):
    assert getattr(config_of(family, tmp_path, **changes), field or "sliding_window") == value


@pytest.mark.parametrize(
    ("family", "old"),
    [
        ("llama", {"rope_theta": 10000.0, "rope_scaling": None}),
        ("llama-linear", {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        (
            "llama-llama3rope",
            {
                "rope_theta": 10000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
        ),
        ("qwen2", {"rope_theta": 10000.0}),
        ("smollm3", {"rope_theta": 2000000.0}),
    ],
)
def test_a_configuration_of_transformers_4_means_the_same(family, old, tmp_path):
    model = make_tiny(family, tmp_path)
    new_config = read_config(tmp_path / "config.json")
    edit_config(tmp_path, rope_parameters=..., layer_types=..., dtype=..., torch_dtype="float32", **old)

    checkpoint = load_checkpoint(str(tmp_path), dtype=torch.float32, progress=lambda line: None)

    assert checkpoint.config == new_config
    assert_same_weights(checkpoint, model)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (["GPT2LMHeadModel"], "architecture 'GPT2LMHeadModel' is not supported"),
        (["MixtralForCausalLM"], "architecture 'MixtralForCausalLM' is not supported"),
        ([], "'architectures' = \\[\\] is not supported"),
        (["LlamaForCausalLM", "Other"], "'architectures' = .* is not supported"),
    ],
)
def test_an_unsupported_architecture_is_named_with_the_supported_ones(architecture, message, tmp_path):
    with pytest.raises(UnsupportedArchitecture, match=f"{message}; supported: {', '.join(FAMILIES)}"):
        config_of("llama", tmp_path, architectures=architecture)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, 'silu' is"),
        ("llama", {"mlp_bias": True}, "'mlp_bias' is not supported"),
        ("smollm3", {"mlp_bias": True}, "'mlp_bias' is not supported"),
        ("llama", {"model_type": "mistral"}, "model_type 'mistral' is not supported, 'llama' is"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'quantization_config'"),
        ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is not supported"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rope_type 'yarn' is not supported; supported: default, linear, llama3",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
            "rope_type 'dynamic' is not supported",
        ),
        ("mistral-swa", {"layer_types": ["sliding_attention"] * 3}, "Mistral with 'layer_types' is not supported"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "'chunked_attention'"),
    ],
)
def test_an_unsupported_feature_is_named(family, changes, message, tmp_path):
    with pytest.raises(UnsupportedArchitecture, match=message):
        config_of(family, tmp_path, **changes)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"num_hidden_layers": 0}, "num_layers must be a positive integer, got 0"),
        ("llama", {"num_key_value_heads": 3}, "4 heads cannot share 3 key-value heads"),
        ("llama", {"head_dim": 15}, "even .* `head_dim`=15"),
        ("llama", {"hidden_size": "wide"}, "hidden_size"),
        ("llama", {"rms_norm_eps": 0.0}, "norm_eps and rope_theta must be positive"),
        ("llama", {"vocab_size": -1}, "vocab_size must be a positive integer"),
        ("mistral-swa", {"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 3 layers"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        (
            "llama-linear",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -1.0}},
            "positive 'factor'",
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    ],
)
def test_an_impossible_value_is_named(family, changes, message, tmp_path):
    with pytest.raises(ModelLoadError, match=message):
        config_of(family, tmp_path, **changes)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff", "[" * 100000])
def test_a_malformed_file_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))

    with pytest.raises(ModelLoadError, match=r"config\.json"):
        read_config(tmp_path / "config.json")
