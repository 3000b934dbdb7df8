"""State of a run on disk, so that a killed run goes on to the same result. Safetensors and JSON only."""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.errors import ResumeError

FOLDER = "state"
KEPT = 2  # an older state is needed only if the disk lost the newest one
_STEP = re.compile(r"step-(\d{8})")
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class RunState:
    """Trained weights and the optimiser's moments, "exp_avg.NAME" and "exp_avg_sq.NAME", after `step` steps."""

    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


def save_state(
    folder: Path, fingerprint: str, step: int, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Write the state after `step` steps; it exists wholly or not at all."""
    tensors = {f"weight.{name}": weight.detach().contiguous() for name, weight in weights.items()}
    for name, weight in weights.items():
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[weight][moment].contiguous()
    target = folder / FOLDER / f"step-{step:08d}"
    unfinished = target.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(tensors, unfinished / "tensors.safetensors")
    (unfinished / "run.json").write_text(json.dumps({"step": step, "fingerprint": fingerprint}))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(unfinished, target)
    for old in _saved(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path, fingerprint: str) -> RunState | None:
    """The newest state in a run's folder, None if there is none.

    Raises:
        ResumeError: The state belongs to a run with other settings, or cannot be read.
    """
    saved = _saved(folder)
    if not saved:
        return None
    try:
        run = json.loads((saved[-1] / "run.json").read_text())
        step, written_by = int(run["step"]), str(run["fingerprint"])
        if written_by != fingerprint:
            raise ResumeError(f"{folder} holds a run with other settings or other text; choose another folder")
        tensors = load_file(saved[-1] / "tensors.safetensors")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ResumeError(
            f"{saved[-1]}: the state of this run cannot be read ({error}); without this folder the run goes on from "
            "the state before it, or from the beginning"
        ) from error
    weights = {name: tensors.pop(f"weight.{name}") for name in _weight_names(tensors)}
    return RunState(step, weights, moments=tensors)


def restore(state: RunState, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Put a state back into the model and its optimiser.

    Raises:
        ResumeError: The model has other weights than the state, which then changes nothing.
    """
    expected = {name: weight.shape for name, weight in weights.items()}
    moments_expected = {f"{moment}.{name}": shape for name, shape in expected.items() for moment in _MOMENTS}
    if _shapes(state.weights) != expected or _shapes(state.moments) != moments_expected:
        raise ResumeError("the saved state has other weights than this model")
    for name, weight in weights.items():
        with torch.no_grad():
            weight.copy_(state.weights[name])
        moments = {moment: state.moments[f"{moment}.{name}"].to(weight.device) for moment in _MOMENTS}
        optimizer.state[weight] = {"step": torch.tensor(float(state.step)), **moments}


def _weight_names(tensors: dict[str, Tensor]) -> list[str]:
    return [name.removeprefix("weight.") for name in tensors if name.startswith("weight.")]


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _saved(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / FOLDER).glob("step-*") if _STEP.fullmatch(path.name))
