import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from training import checkpointing
from training.checkpointing import FOLDER, KEPT, load_state, restore, save_state
from training.errors import ResumeError

FINGERPRINT = "the settings"


class Run:
    """Two weights and their optimiser, a step at a time."""

    def __init__(self) -> None:
        self.weights = {"matrix": nn.Parameter(torch.zeros(3, 4)), "vector": nn.Parameter(torch.zeros(4))}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=0.1)

    def train(self, *steps: int) -> "Run":
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for weight in self.weights.values():
                weight.grad = torch.randn(weight.shape, generator=generator)
            self.optimizer.step()
        return self

    def save(self, folder: Path, step: int) -> None:
        save_state(folder, FINGERPRINT, step, self.weights, self.optimizer)

    @property
    def values(self) -> list[list[float]]:
        return [weight.detach().flatten().tolist() for weight in self.weights.values()]


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / FOLDER).iterdir())


def resumed(folder: Path) -> tuple[Run, int]:
    state = load_state(folder, FINGERPRINT)
    assert state is not None
    run = Run()
    restore(state, run.weights, run.optimizer)
    return run, state.step


def test_a_new_folder_has_no_state(tmp_path: Path) -> None:
    assert load_state(tmp_path, FINGERPRINT) is None
    assert load_state(tmp_path / "not yet there", FINGERPRINT) is None


def test_a_restored_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    Run().train(1, 2, 3).save(tmp_path, 3)
    run, step = resumed(tmp_path)
    assert step == 3
    assert run.train(4, 5).values == Run().train(1, 2, 3, 4, 5).values


def test_the_newest_state_counts_and_older_ones_go(tmp_path: Path) -> None:
    run = Run()
    for step in range(8, 13):  # 8, 9, 10: the order is that of numbers
        run.train(step).save(tmp_path, step)
    assert len(states(tmp_path)) == KEPT
    restored, step = resumed(tmp_path)
    assert step == 12
    assert restored.values == run.values


@pytest.mark.parametrize("killed_in", ["save_file", "write_text", "replace"])
def test_a_kill_in_the_middle_of_a_save_leaves_the_state_before_it(
    killed_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run().train(1)
    run.save(tmp_path, 1)
    before = run.values
    run.train(2)

    def half_done(*arguments: Any, **keywords: Any) -> None:
        if killed_in == "save_file":
            Path(arguments[1]).write_bytes(b"half")
        raise KeyboardInterrupt

    owner: object = {"save_file": checkpointing, "write_text": Path, "replace": os}[killed_in]
    with monkeypatch.context() as patch:
        patch.setattr(owner, killed_in, half_done)
        with pytest.raises(KeyboardInterrupt):
            run.save(tmp_path, 2)

    restored, step = resumed(tmp_path)
    assert step == 1
    assert restored.values == before
    run.save(tmp_path, 2)
    assert resumed(tmp_path)[1] == 2
    assert states(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    Run().train(1).save(tmp_path, 1)
    with pytest.raises(ResumeError, match="other settings or other text; choose another folder"):
        load_state(tmp_path, "other settings")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tensors.safetensors", b""),
        ("tensors.safetensors", b"\xff" * 100),
        ("run.json", b"{"),
        ("run.json", b"[]"),
        ("run.json", b"\xff"),
        ("run.json", json.dumps({"fingerprint": FINGERPRINT}).encode()),
        ("run.json", json.dumps({"fingerprint": FINGERPRINT, "step": None}).encode()),
        ("tensors.safetensors", None),
        ("run.json", None),
    ],
    ids=str,
)
def test_a_state_that_cannot_be_read_is_an_error_that_names_it(
    file: str, content: bytes | None, tmp_path: Path
) -> None:
    run = Run().train(1)
    run.save(tmp_path, 1)
    run.train(2).save(tmp_path, 2)
    newest = tmp_path / FOLDER / "step-00000002"
    if content is None:
        (newest / file).unlink()
    else:
        (newest / file).write_bytes(content)

    with pytest.raises(ResumeError, match=r"step-00000002: the state of this run cannot be read"):
        load_state(tmp_path, FINGERPRINT)
    shutil.rmtree(newest)  # what the message advises
    assert resumed(tmp_path)[1] == 1


def test_a_tensor_file_cut_short_is_an_error(tmp_path: Path) -> None:
    Run().train(1).save(tmp_path, 1)
    path = tmp_path / FOLDER / "step-00000001" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ResumeError):
        load_state(tmp_path, FINGERPRINT)


@pytest.mark.parametrize("change", ["name", "shape"])
def test_a_model_with_other_weights_is_refused_and_stays_as_it_is(change: str, tmp_path: Path) -> None:
    Run().train(1).save(tmp_path, 1)
    state = load_state(tmp_path, FINGERPRINT)
    assert state is not None
    run = Run()
    other = nn.Parameter(torch.zeros(4) if change == "name" else torch.zeros(1))
    weights = {"matrix": run.weights["matrix"], ("other" if change == "name" else "vector"): other}
    with pytest.raises(ResumeError, match="other weights than this model"):
        restore(state, weights, run.optimizer)
    assert not run.weights["matrix"].any()
