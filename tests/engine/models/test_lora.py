import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from engine.activation import ActivationMode, PositiveBranch
from engine.errors import ModelLoadError
from engine.models import Checkpoint, load_checkpoint
from engine.models.lora import TARGETS
from tests.engine.models.compare import assert_same_weights
from tests.engine.models.tiny import make_tiny
from tests.engine.models.tiny_gguf import write_gguf

CONFIGS = {
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16},
    "everything": {"target_modules": list(TARGETS), "r": 8, "lora_alpha": 4},
    "rslora": {"target_modules": list(TARGETS), "r": 4, "lora_alpha": 8, "use_rslora": True},
    "some layers": {"target_modules": ["down_proj", "k_proj"], "r": 2, "layers_to_transform": [0, 2]},
    "patterns": {
        "target_modules": list(TARGETS),
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.[qk]_proj": 6},
        "alpha_pattern": {"o_proj": 3, "model.layers.0.mlp.up_proj": 5, "j_proj": 100},
    },
}


def load(model: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    return load_checkpoint(str(model), dtype=dtype, adapter=str(adapter), progress=lambda line: None)


def make_adapter(model: PreTrainedModel, path: Path, **settings) -> PeftModel:
    """Write a random adapter; `model` is wrapped in place."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(path)
    return adapted


def edit_config(adapter: Path, **changes) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(
    adapter: Path, changes: dict[str, torch.Tensor | None], metadata: dict[str, str] | None = None
) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata=metadata)


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """A tiny Llama and an adapter of its attention."""
    make_adapter(make_tiny("llama", tmp_path / "model"), tmp_path / "adapter", **CONFIGS["attention"])
    return tmp_path / "model", tmp_path / "adapter"


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_merged_weights_equal_those_that_peft_merges(family, settings, tmp_path):
    model = make_tiny(family, tmp_path / "model")
    adapted = make_adapter(model, tmp_path / "adapter", **settings)

    checkpoint = load(tmp_path / "model", tmp_path / "adapter")

    assert_same_weights(checkpoint, adapted.merge_and_unload(), atol=1e-6)


def test_an_adapter_is_merged_into_a_gguf_file(tmp_path):
    model = make_tiny("llama", tmp_path / "hf")
    write_gguf(tmp_path / "tiny.gguf", model, "llama")
    adapted = make_adapter(model, tmp_path / "adapter", **CONFIGS["everything"])

    checkpoint = load(tmp_path / "tiny.gguf", tmp_path / "adapter")

    assert_same_weights(checkpoint, adapted.merge_and_unload(), atol=1e-6)


def test_the_sum_is_rounded_once(tmp_path):
    model = make_tiny("llama", tmp_path / "model")
    make_adapter(model, tmp_path / "adapter", **CONFIGS["everything"])

    rounded = load(tmp_path / "model", tmp_path / "adapter", torch.bfloat16)
    exact = load(tmp_path / "model", tmp_path / "adapter")

    assert torch.equal(rounded.weights.layers[1].down, exact.weights.layers[1].down.to(torch.bfloat16))


def test_the_adapter_says_which_activations_are_supported(folders):
    model, adapter = folders
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt", "siluette.modes": "silu"})
    edit_weights(adapter, {}, {"siluette.modes": "silu,relu", "siluette.positive_branch": "identity"})

    alone = load_checkpoint(str(model), dtype=torch.float32, progress=lambda line: None).support
    adapted = load(model, adapter).support

    assert alone.modes == (ActivationMode.SILU,)
    assert adapted.modes == (ActivationMode.SILU, ActivationMode.RELU)
    assert adapted.positive_branch is PositiveBranch.IDENTITY
    assert adapted.tuned


def test_an_adapter_that_says_nothing_leaves_the_models_activations(folders):
    model, adapter = folders
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt", "siluette.modes": "silu"})

    assert load(model, adapter).support.modes == (ActivationMode.SILU,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported, 'LORA' is"),
        ({"bias": "all"}, "bias 'all' is not supported, 'none' is"),
        ({"modules_to_save": ["lm_head"]}, r"'modules_to_save' = \['lm_head'\] is not supported"),
        ({"use_dora": True}, "'use_dora' = True is not supported"),
        ({"fan_in_fan_out": True}, "'fan_in_fan_out' = True is not supported"),
        ({"lora_bias": True}, "'lora_bias' = True is not supported"),
        ({"layer_replication": [[0, 2]]}, "'layer_replication' .* is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"r": 5}, "has rank 4, the configuration says 5"),
        ({"r": None}, "has rank 4, the configuration says None"),
        ({"lora_alpha": "big"}, "lora_alpha must be a number, got 'big'"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern has an invalid pattern '\('"),
        ({"alpha_pattern": [1]}, "alpha_pattern must map patterns to numbers"),
    ],
)
def test_an_unsupported_or_impossible_setting_is_named(changes, message, folders):
    model, adapter = folders
    edit_config(adapter, **changes)

    with pytest.raises(ModelLoadError, match=message):
        load(model, adapter)


PREFIX = "base_model.model.model.layers"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{PREFIX}.0.self_attn.q_proj.lora_B.weight": None}, "'model.layers.0.self_attn.q_proj' has only one of"),
        ({f"{PREFIX}.0.self_attn.q_proj.lora_B.weight": torch.ones(60, 4)}, r"\[60, 4\] .* does not fit .* \[64, 64\]"),
        ({f"{PREFIX}.0.self_attn.q_proj.lora_A.weight": torch.ones(4)}, "lora_A.weight' must be a matrix"),
        (
            {f"{PREFIX}.7.mlp.up_proj.lora_{side}.weight": torch.ones(4, 4) for side in "AB"},
            "match nothing in the model: base_model.model.model.layers.7.mlp.up_proj.lora_A.weight",
        ),
        ({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)}, "not LoRA weights of .*: .*lm_head.lora_A"),
        ({f"{PREFIX}.0.self_attn.q_proj.weight": torch.ones(64, 64)}, "not LoRA weights of .*q_proj.weight"),
    ],
)
def test_a_key_that_does_not_fit_is_named(changes, message, folders):
    model, adapter = folders
    edit_weights(adapter, changes)

    with pytest.raises(ModelLoadError, match=message):
        load(model, adapter)


def test_an_adapter_of_another_model_is_refused(folders, tmp_path):
    _, adapter = folders
    make_tiny("llama", tmp_path / "wide", hidden_size=128)

    with pytest.raises(ModelLoadError, match=r"does not fit tensor 'model.layers.0.self_attn.q_proj.weight'"):
        load(tmp_path / "wide", adapter)


def test_an_empty_adapter_is_refused(folders):
    model, adapter = folders
    save_file({}, adapter / "adapter_model.safetensors")

    with pytest.raises(ModelLoadError, match="holds no LoRA weights"):
        load(model, adapter)


def test_a_pickled_adapter_is_refused(folders):
    model, adapter = folders
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()

    with pytest.raises(ModelLoadError, match=r"no adapter_model\.safetensors; adapters are read from safetensors"):
        load(model, adapter)


def test_a_folder_without_a_configuration_is_refused(folders):
    model, _ = folders

    with pytest.raises(ModelLoadError, match=r"not an adapter folder, it has no adapter_config\.json"):
        load(model, model)
