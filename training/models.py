"""Loads a checkpoint into transformers' modules and decides which of its weights are trained."""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engine import ModelLocation, SourceFormat, resolve_model
from training.activation import is_gated
from training.config import Trained, TuneConfig
from training.errors import InvalidTuneConfig, UnsupportedModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
FFN_TARGETS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
NO_FOREIGN_CODE = {"trust_remote_code": False}  # left out, transformers asks on the terminal whether to run it


@dataclass(slots=True)
class TrainedModel:
    """A model that is about to be trained.

    Attributes:
        model: What runs: with LoRA, peft's wrapper.
        tokenizer: transformers'.
        location: Where it came from.
        teacher: The untouched model, where the loss needs it.
    """

    model: Any
    tokenizer: Any
    location: ModelLocation
    teacher: nn.Module | None

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained weights by name, in a fixed order."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}


def load_model(config: TuneConfig, progress: Callable[[str], None]) -> TrainedModel:
    """Load what `config` names.

    Frozen weights have the type of `config.dtype`, trained ones are float32.

    Raises:
        ModelLoadError: There is no such model.
        UnsupportedModel: It cannot be trained this way.
        InvalidTuneConfig: There is no such device.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InvalidTuneConfig("device must be 'cpu', for PyTorch finds no CUDA device here", "device")
    location = resolve_model(config.model, progress)
    progress(f"Loading {location.name}")
    source, options = _source(location)
    try:
        return _load_as(config, location, source, options)
    except (ValueError, KeyError) as error:  # what transformers raises for a model that it does not know
        raise UnsupportedModel(f"{location.name}: transformers cannot load it: {error}") from error


def _load_as(config: TuneConfig, location: ModelLocation, source: str, options: dict[str, Any]) -> TrainedModel:
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    torch.manual_seed(config.seed)  # initial weights, of adapters too
    if config.from_scratch:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, **options))
    else:
        model = _load(source, options, dtype)
    teacher = None
    if config.distillation > 0:  # never from scratch
        teacher = copy.deepcopy(model).requires_grad_(False).eval().to(config.device)
    model = _choose_trained(model, config)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
        # Another name from transformers 5.2x on; the old one goes in version 6.
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode only; `_no_dropout` keeps it deterministic
    return TrainedModel(_no_dropout(model).to(config.device), tokenizer, location, teacher)


def _source(location: ModelLocation) -> tuple[str, dict[str, Any]]:
    if location.source_format is SourceFormat.GGUF:
        return str(location.path.parent), {"gguf_file": location.path.name, **NO_FOREIGN_CODE}
    return str(location.path), {**NO_FOREIGN_CODE}


def _load(source: str, options: dict[str, Any], dtype: torch.dtype) -> Any:
    if "gguf_file" in options:
        # Newer releases keep GGUF weights packed unless they are told not to.
        quantization = importlib.import_module("transformers.utils.quantization_config")
        if hasattr(quantization, "GgufConfig"):
            options = {**options, "quantization_config": quantization.GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer = None  # weights are plain tensors now, peft must not think otherwise
    model.config.quantization_config = None
    del model.config.quantization_config
    return model


def _choose_trained(model: Any, config: TuneConfig) -> Any:
    if config.trained is Trained.LORA:
        return _with_lora(model, config)
    model.requires_grad_(config.trained is Trained.ALL)
    if config.trained is Trained.FFN:
        for block in (block for block in model.modules() if is_gated(block)):
            block.requires_grad_(True)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return model


def _with_lora(model: Any, config: TuneConfig) -> Any:
    wrapped = _new_lora(model, config) if config.adapter is None else _saved_lora(model, config.adapter)
    for module in wrapped.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # autocast brings both sides of a product to one type
    return wrapped


def _saved_lora(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    if not (folder / ADAPTER_WEIGHTS).is_file():  # peft would take a pickled file instead
        raise InvalidTuneConfig(f"adapter must be a folder with {ADAPTER_WEIGHTS}, got {folder}", "adapter")
    return PeftModel.from_pretrained(model, folder, is_trainable=True, autocast_adapter_dtype=True)


def _new_lora(model: Any, config: TuneConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    names = [name for name in FFN_TARGETS if any(hasattr(block, name) for block in model.modules() if is_gated(block))]
    if not names:
        raise UnsupportedModel(f"{type(model).__name__} has no gated feed-forward block")
    alpha = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    lora = LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM")
    return get_peft_model(model, lora, autocast_adapter_dtype=True)


def _no_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


def forward_logits(model: Any, token_ids: Tensor) -> Tensor:
    """Logits [batch, tokens, vocab] of token ids [batch, tokens]."""
    logits: Tensor = model(input_ids=token_ids, use_cache=False).logits
    return logits
