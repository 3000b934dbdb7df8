"""Where a run starts from."""

from pathlib import Path

import pytest
import torch

from tests.engine.models.tiny import make_tiny
from tests.training.tiny_run import settings, trained_weights, trainer
from training.config import Trained
from training.errors import InvalidTuneConfig
from training.export import ADAPTER_WEIGHTS, export


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_tiny("llama", folder)
    return folder


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = trainer(settings(model, tmp_path_factory.mktemp("first"), lora_rank=3, lora_alpha=6))
    for _ in run.run():
        pass
    folder = tmp_path_factory.mktemp("adapter")
    export(run.loaded, run.config, None, folder)
    return folder


def test_a_run_goes_on_from_an_adapter(model: Path, adapter: Path, tmp_path: Path) -> None:
    first = trainer(settings(model, tmp_path / "from nothing", lora_rank=3, lora_alpha=6))
    second = trainer(settings(model, tmp_path / "from it", adapter=adapter))

    weights = trained_weights(second)
    assert weights.keys() == trained_weights(first).keys()
    assert all(weight.dtype is torch.float32 for weight in weights.values())
    assert second.loaded.model.peft_config["default"].r == 3
    assert any(bool(weight.any()) for name, weight in weights.items() if "lora_B" in name)
    for _ in second.run():
        pass
    assert any(not torch.equal(weight, weights[name]) for name, weight in trained_weights(second).items())


def test_a_pickled_adapter_is_refused(model: Path, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    (folder / "adapter_model.bin").write_bytes(b"whatever")

    with pytest.raises(InvalidTuneConfig, match=ADAPTER_WEIGHTS):
        trainer(settings(model, tmp_path / "run", adapter=folder))


def test_only_lora_goes_on_from_an_adapter(model: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidTuneConfig, match="'lora' to go on from an adapter"):
        settings(model, tmp_path, adapter=adapter, trained=Trained.FFN)
