"""Writes what a run has made: an adapter in PEFT's format, or a whole checkpoint. Both say what they were tuned for."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine import ActivationMode, ActivationSupport, MeasuredQuality
from training.config import Method, Trained, TuneConfig
from training.log import Measurement
from training.models import ADAPTER_WEIGHTS, TrainedModel
from training.schedule import Constant, Linear, Mixture

CHECKPOINT_WEIGHTS = "model.safetensors"


def tuned_support(config: TuneConfig) -> ActivationSupport:
    """The modes that a run trains.

    A RELU phase makes RELU good, a distribution of p its range; SILU counts as tuned only if sequences were trained in
    it, for a run changes what SILU computes too.
    """
    starts_in_relu, ends_in_relu = config.relu_from == 0, config.relu_from < config.steps
    modes = {ActivationMode.SILU} if config.method is Method.SWI_FT and not starts_in_relu else set()
    low, high = 1.0, 0.0
    if config.method is Method.STOCHA and not starts_in_relu:
        match config.p:
            case Constant(p):
                low = high = p
            case Linear(start, end):
                low, high = min(start, end), max(start, end)
            case Mixture(relu, silu, uniform):
                modes |= {ActivationMode.RELU} if relu else set()
                modes |= {ActivationMode.SILU} if silu else set()
                low, high = (0.0, 1.0) if uniform else (low, high)
        if low <= high:
            modes.add(ActivationMode.STOCHASTIC)
        if low <= high and high == 1:
            modes.add(ActivationMode.SILU)
    if ends_in_relu or low == 0:
        modes.add(ActivationMode.RELU)
    ordered = tuple(mode for mode in ActivationMode if mode in modes)
    return ActivationSupport(ordered, min(low, high), max(low, high), config.positive_branch, tuned=True)


def metadata(support: ActivationSupport, quality: Measurement | None) -> dict[str, str]:
    """Header of the safetensors file; the engine reads it when it loads the file."""
    header = {"format": "pt", **support.to_metadata()}
    if quality is not None:
        perplexity = {text: dict(values) for text, values in quality.perplexity.items()}
        header |= MeasuredQuality(perplexity, tuple(quality.zeros)).to_metadata()
    return header


def export(loaded: TrainedModel, config: TuneConfig, quality: Measurement | None, folder: Path) -> Path:
    """Write the result into a folder.

    Args:
        loaded: The trained model.
        config: Its run.
        quality: The last measurement, for the metadata.
        folder: Made if it does not exist.

    Returns:
        The weights' file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header = metadata(tuned_support(config), quality)
    if config.trained is Trained.LORA:
        return _export_adapter(loaded, header, folder)
    return _export_checkpoint(loaded, header, folder, torch.bfloat16 if config.dtype == "bfloat16" else torch.float32)


def _export_adapter(loaded: TrainedModel, header: dict[str, str], folder: Path) -> Path:
    from peft import get_peft_model_state_dict

    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in get_peft_model_state_dict(loaded.model).items()
    }
    settings = loaded.model.peft_config["default"].to_dict()
    settings |= {"base_model_name_or_path": loaded.location.name, "inference_mode": True}
    settings["target_modules"] = sorted(settings["target_modules"])  # a set has no order to rely on
    _write_json(folder / "adapter_config.json", {key: settings[key] for key in sorted(settings)})
    save_file(tensors, folder / ADAPTER_WEIGHTS, header)
    return folder / ADAPTER_WEIGHTS


def _export_checkpoint(loaded: TrainedModel, header: dict[str, str], folder: Path, dtype: torch.dtype) -> Path:
    model = loaded.model
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    tensors: dict[str, Tensor] = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    save_file(tensors, folder / CHECKPOINT_WEIGHTS, header)
    return folder / CHECKPOINT_WEIGHTS


def _write_json(path: Path, document: Mapping[str, object]) -> None:
    path.write_text(json.dumps(document, indent=2, default=_as_json) + "\n")


def _as_json(value: object) -> object:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)
