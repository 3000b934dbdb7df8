import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.errors import ModelLoadError, UnsupportedArchitecture
from engine.models import load_checkpoint
from engine.models.config import LinearRopeScaling
from engine.models.rope import inverse_frequencies
from tests.engine.models.compare import assert_same_weights, unfused
from tests.engine.models.tiny import LLAMA3_ROPE, make_tiny
from tests.engine.models.tiny_gguf import write_gguf

ARCHITECTURES = [
    ("llama-untied", "llama", "LlamaForCausalLM"),
    ("llama-bias", "llama", "LlamaForCausalLM"),
    ("smollm2-tied", "llama", "LlamaForCausalLM"),
    ("qwen2", "qwen2", "Qwen2ForCausalLM"),
    ("qwen3", "qwen3", "Qwen3ForCausalLM"),
    ("smollm3", "smollm3", "SmolLM3ForCausalLM"),
]
QUANTIZATIONS = [Q.Q4_0, Q.Q4_1, Q.Q8_0, Q.Q4_K, Q.Q6_K, Q.F16, Q.BF16, Q.F32]


def load(path, dtype=torch.float32):
    return load_checkpoint(str(path), dtype=dtype, progress=lambda line: None)


@pytest.fixture
def llama(tmp_path):
    return make_tiny("llama", tmp_path / "hf")


@pytest.mark.parametrize(("family", "architecture", "hf_architecture"), ARCHITECTURES)
def test_weights_equal_those_that_were_converted(family, architecture, hf_architecture, tmp_path):
    model = make_tiny(family, tmp_path / "hf")
    write_gguf(tmp_path / "tiny.gguf", model, architecture)

    checkpoint = load(tmp_path / "tiny.gguf")

    assert checkpoint.config.architecture == hf_architecture
    assert_same_weights(checkpoint, model)


@pytest.mark.parametrize("family", ["llama-untied", "llama-bias", "smollm2-tied", "qwen2", "qwen3"])
def test_the_configuration_equals_that_of_the_folder(family, tmp_path):
    model = make_tiny(family, tmp_path / "hf", rms_norm_eps=2.0**-20)  # survives the format's float32
    write_gguf(tmp_path / "tiny.gguf", model, model.config.model_type)

    assert load(tmp_path / "tiny.gguf").config == load(tmp_path / "hf").config


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(
    ("family", "architecture"), [("llama-untied", "llama"), ("smollm2-tied", "llama"), ("qwen2", "qwen2")]
)
def test_every_format_is_dequantised_as_transformers_does(family, architecture, quantization, tmp_path):
    # K formats have blocks of 256 elements, which a row must be a multiple of.
    model = make_tiny(family, tmp_path / "hf", hidden_size=256, intermediate_size=512, num_hidden_layers=2, head_dim=64)
    meant = write_gguf(tmp_path / "tiny.gguf", model, architecture, quantization)

    checkpoint = load(tmp_path / "tiny.gguf")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)

    assert_same_weights(checkpoint, reference)
    found = unfused(checkpoint.config, checkpoint.weights)
    for name, tensor in meant.items():
        assert torch.equal(found[name], tensor), name


def test_large_tensors_are_dequantised_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.models.gguf_loader.CHUNK_ELEMENTS", 64 * 7)  # 7 rows; 320 is no multiple of it
    model = make_tiny("smollm2-tied", tmp_path / "hf")
    write_gguf(tmp_path / "tiny.gguf", model, "llama")

    assert_same_weights(load(tmp_path / "tiny.gguf"), model)


def test_every_fourth_layer_of_smollm3_does_not_rotate(tmp_path):
    model = make_tiny("smollm3", tmp_path / "hf", num_hidden_layers=8, no_rope_layers=None)
    write_gguf(tmp_path / "tiny.gguf", model, "smollm3")

    checkpoint = load(tmp_path / "tiny.gguf")

    assert checkpoint.config.use_rope == (True, True, True, False, True, True, True, False)
    assert checkpoint.config.use_rope == load(tmp_path / "hf").config.use_rope
    assert_same_weights(checkpoint, model)


def test_llama3_scaling_comes_from_the_factors_in_the_file(llama, tmp_path):
    plain = inverse_frequencies(16, 10000.0)
    expected = LlamaRotaryEmbedding(LlamaConfig(head_dim=16, rope_parameters=LLAMA3_ROPE)).inv_freq
    write_gguf(tmp_path / "tiny.gguf", llama, "llama", tensors={"rope_freqs.weight": (plain / expected).numpy()})

    found = load(tmp_path / "tiny.gguf").weights.rope_inv_freq

    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    assert not torch.allclose(found, plain)


@pytest.mark.parametrize(
    "keys", [{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope.scale_linear": 4.0}]
)
def test_linear_scaling(keys, tmp_path):
    model = make_tiny("llama-linear", tmp_path / "hf")
    metadata = {f"llama.{key}": value for key, value in keys.items()}
    write_gguf(tmp_path / "tiny.gguf", model, "llama", metadata=metadata)

    checkpoint = load(tmp_path / "tiny.gguf")

    assert checkpoint.config.rope_scaling == LinearRopeScaling(4.0)
    assert_same_weights(checkpoint, model)


def test_sliding_window(llama, tmp_path):
    write_gguf(tmp_path / "all.gguf", llama, "llama", metadata={"llama.attention.sliding_window": 8})
    pattern = {"llama.attention.sliding_window": 8, "llama.attention.sliding_window_pattern": [True, False, True]}
    write_gguf(tmp_path / "some.gguf", llama, "llama", metadata=pattern)

    config = load(tmp_path / "all.gguf").config

    assert config.architecture == "MistralForCausalLM"
    assert config.sliding_window == (8, 8, 8)
    assert load(tmp_path / "some.gguf").config.sliding_window == (8, None, 8)


def test_a_size_listed_per_layer_counts_when_all_layers_agree(llama, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", llama, "llama", metadata={"llama.attention.head_count_kv": [2, 2, 2]})

    assert_same_weights(load(tmp_path / "tiny.gguf"), llama)


def test_end_of_sequence_and_end_of_turn_end_a_text(llama, tmp_path):
    keys = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 1}
    write_gguf(tmp_path / "tiny.gguf", llama, "llama", metadata=keys)

    assert load(tmp_path / "tiny.gguf").eos_token_ids == (2, 1)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "expert_count"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' .* supported: none, linear, llama3"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count"),
        ({"llama.attention.value_length": 32}, "attention.value_length"),
        ({"llama.attention.head_count_kv": [2, 1, 2]}, "'llama.attention.head_count_kv' differs between layers"),
        ({"llama.attention.sliding_window_pattern": 4}, "sliding_window_pattern' must list one flag per layer"),
    ],
)
def test_an_unsupported_feature_is_named(metadata, message, llama, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", llama, "llama", metadata=metadata)

    with pytest.raises(UnsupportedArchitecture, match=message):
        load(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": None}, "'llama.block_count' is missing"),
        ({"llama.block_count": "three"}, "'llama.block_count' must be of type int, got 'three'"),
        ({"llama.block_count": 2**31}, "2147483648 layers in a file of"),
        ({"llama.attention.head_count": 0}, "num_heads must be a positive integer"),
        ({"llama.attention.head_count_kv": 3}, "4 heads cannot share 3 key-value heads"),
        ({"llama.embedding_length": 32}, "'token_embd.weight' .* has shape"),
        (
            {f"llama.{key}": 15 for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")},
            "head_dim must be even to be rotated, got 15",
        ),
        ({"llama.context_length": 0}, "max_position must be a positive integer"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "norm_eps and rope_theta must be positive"),
        ({"llama.attention.sliding_window_pattern": [True]}, "sliding_window_pattern' lists 1 of 3 layers"),
    ],
)
def test_an_impossible_key_is_named(metadata, message, llama, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", llama, "llama", metadata=metadata)

    with pytest.raises(ModelLoadError, match=message):
        load(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("blk.1.attn_k.weight", None, "missing tensor 'blk.1.attn_k.weight' in"),
        ("token_embd.weight", None, "missing tensor 'token_embd.weight' in"),
        ("blk.1.attn_norm.weight", np.ones(63, np.float32), r"'blk.1.attn_norm.weight' .* \[63\]"),
        ("blk.1.ffn_up.bias", np.ones(128, np.float32), "'blk.1.ffn_up.bias' .* has no place in LlamaForCausalLM"),
        ("rope_freqs.weight", np.ones(7, np.float32), r"'rope_freqs.weight' .* must be F32 with shape \[8\]"),
    ],
)
def test_a_wrong_tensor_is_named(name, array, message, llama, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", llama, "llama", tensors={name: array})

    with pytest.raises(ModelLoadError, match=message):
        load(tmp_path / "tiny.gguf")


def test_an_unsupported_format_is_named(llama, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", llama, "llama", Q.Q5_0)

    with pytest.raises(UnsupportedArchitecture, match="has format Q5_0; supported: Q4_0, Q4_1, Q8_0, Q4_K, Q6_K, F16"):
        load(tmp_path / "tiny.gguf")


def test_an_unsupported_architecture_is_named(llama, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", llama, "granite")

    with pytest.raises(
        UnsupportedArchitecture, match="'granite' is not supported; supported: llama, qwen2, qwen3, smollm3"
    ):
        load(tmp_path / "tiny.gguf")


@pytest.mark.slow
def test_the_default_model_equals_the_one_that_transformers_loads():
    checkpoint = load_checkpoint(None, dtype=torch.float32, adapter="none", progress=lambda line: None)
    folder, file = checkpoint.path.parent, checkpoint.path.name
    reference = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)

    assert_same_weights(checkpoint, reference)
