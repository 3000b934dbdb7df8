import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelLoadError
from engine.models import load_checkpoint
from tests.engine.models.compare import assert_same_weights, cast_parameters
from tests.engine.models.tiny import FAMILIES, make_tiny


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return load_checkpoint(str(folder), dtype=dtype, progress=lambda line: None)


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; dots in names are written as double underscores."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_index(folder: Path, tensor: str, file_name: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][tensor] = file_name
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_a_single_file_equal_those_that_were_saved(family, tmp_path):
    model = make_tiny(family, tmp_path)

    assert_same_weights(load(tmp_path), model)


@pytest.mark.parametrize("family", ["llama-untied", "smollm2-tied"])
def test_weights_of_shards_equal_those_that_were_saved(family, tmp_path):
    model = make_tiny(family, tmp_path, max_shard_size="100KB")

    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(load(tmp_path), model)


def test_weights_are_rounded_to_the_requested_type(tmp_path):
    model = make_tiny("qwen2", tmp_path)

    checkpoint = load(tmp_path, torch.bfloat16)

    assert checkpoint.weights.layers[0].qkv_bias.dtype == torch.bfloat16
    assert checkpoint.weights.rope_inv_freq.dtype == torch.float32
    assert_same_weights(checkpoint, cast_parameters(model, torch.bfloat16))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_may_be_stored_in_any_floating_point_type(stored, tmp_path):
    model = cast_parameters(make_tiny("llama", tmp_path), stored)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")

    assert_same_weights(load(tmp_path), model)


def test_one_neuron_of_the_feed_forward_layer_is_one_contiguous_row(tmp_path):
    make_tiny("llama", tmp_path)

    layer = load(tmp_path).weights.layers[0]

    assert layer.down.shape == layer.up.shape == layer.gate.shape == (128, 64)
    assert layer.down.is_contiguous()
    assert layer.up.is_contiguous()


def test_parameters_are_counted_once(tmp_path):
    model = make_tiny("smollm2-tied", tmp_path)

    assert load(tmp_path).num_parameters == model.num_parameters()


def test_an_output_matrix_that_differs_from_the_embeddings_unties_them(tmp_path):
    make_tiny("smollm2-tied", tmp_path)
    other = torch.randn(320, 64)
    edit_tensors(tmp_path, lm_head__weight=other)

    checkpoint = load(tmp_path)

    assert not checkpoint.config.tie_embeddings
    assert torch.equal(checkpoint.weights.lm_head, other)


def test_an_output_matrix_that_equals_the_embeddings_is_not_kept_twice(tmp_path):
    model = make_tiny("smollm2-tied", tmp_path)
    edit_tensors(tmp_path, lm_head__weight=model.lm_head.weight.detach().clone())

    assert_same_weights(load(tmp_path), model)


def test_old_checkpoints_may_hold_rotary_frequencies(tmp_path):
    model = make_tiny("llama", tmp_path)
    edit_tensors(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))

    assert_same_weights(load(tmp_path), model)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model__layers__1__mlp__up_proj__weight", None, "missing tensor 'model.layers.1.mlp.up_proj.weight' in"),
        ("lm_head__weight", None, "missing tensor 'lm_head.weight' in"),
        ("model__norm__weight", torch.ones(63), r"'model.norm.weight' in .* has shape \[63\], .* says \[64\]"),
        ("model__layers__2__mlp__up_proj__bias", torch.ones(128), "'model.layers.2.mlp.up_proj.bias' .* has no place"),
        ("model__norm__weight", torch.ones(64, dtype=torch.int8), "'model.norm.weight' in .* has type I8"),
    ],
)
def test_a_wrong_tensor_is_named(name, tensor, message, tmp_path):
    make_tiny("llama", tmp_path)
    edit_tensors(tmp_path, **{name: tensor})

    with pytest.raises(ModelLoadError, match=message):
        load(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    make_tiny("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(ModelLoadError, match="cannot be read as a safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize(
    "file_name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "a\\b.safetensors"]
)
def test_an_index_cannot_point_outside_its_folder(file_name, tmp_path):
    make_tiny("llama", tmp_path / "model", max_shard_size="100KB")
    make_tiny("llama", tmp_path)  # so that "../model.safetensors" exists
    edit_index(tmp_path / "model", "model.norm.weight", file_name)

    with pytest.raises(ModelLoadError, match=r"'model\.norm\.weight' lies in .* not a plain file name"):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("tensor", "file_name", "message"),
    [
        ("model.norm.weight", "pytorch_model.bin", "not a .safetensors file"),
        ("model.norm.weight", "missing.safetensors", "missing.safetensors: cannot be read"),
        ("model.extra.weight", "model-00001-of-00009.safetensors", "does not hold it"),
    ],
)
def test_an_index_that_contradicts_its_shards_is_refused(tensor, file_name, message, tmp_path):
    make_tiny("llama", tmp_path, max_shard_size="100KB")
    first = min(tmp_path.glob("*.safetensors")).name
    edit_index(tmp_path, tensor, file_name.replace("model-00001-of-00009.safetensors", first))

    with pytest.raises(ModelLoadError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("content", ["not json", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_malformed_index_is_refused(content, tmp_path):
    make_tiny("llama", tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)

    with pytest.raises(ModelLoadError, match=r"index\.json"):
        load(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    model = make_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")

    with pytest.raises(ModelLoadError, match=r"only pytorch_model\.bin.*safetensors and GGUF files only"):
        load(tmp_path)
