"""LoRA adapters in PEFT's format, merged into the weights while they are loaded (LoRA, arXiv 2106.09685)."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from engine.errors import ModelLoadError
from engine.models.architectures import read_json
from engine.models.safetensors_loader import SafetensorsFile
from engine.models.weights import TensorSource

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_REFUSED: Final = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
# Other initialisations (PiSSA, OLoRA, CorDA, LoftQ) change the base weights, which an adapter file does not hold.
_INITIALISATIONS: Final = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True)
class _Delta:
    """What an adapter adds to one weight: scale * b @ a."""

    a: str  # key of [rank, in]
    b: str  # key of [out, rank]
    scale: float


class LoraAdapter:
    """An adapter folder.

    Attributes:
        path: The folder.
        metadata: The `siluette.*` keys of the weight file's header.

    Raises:
        ModelLoadError: Files are missing or malformed, or the adapter uses a feature that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / CONFIG_FILE).is_file():
            raise ModelLoadError(f"{path}: not an adapter folder, it has no {CONFIG_FILE}")
        if not (path / WEIGHTS_FILE).is_file():
            raise ModelLoadError(f"{path}: no {WEIGHTS_FILE}; adapters are read from safetensors files only")
        config = read_json(path / CONFIG_FILE)
        _check_features(config, path / CONFIG_FILE)
        self._file = SafetensorsFile(path / WEIGHTS_FILE)
        self.metadata = self._file.metadata
        self._deltas = self._pair_up(config)

    def merged_into(self, base: TensorSource) -> "LoraSource":
        """The base model's tensors with this adapter's changes added.

        Raises:
            ModelLoadError: A key of the adapter matches no weight of the model, or not its shape.
        """
        unmatched = sorted(delta.a for weight, delta in self._deltas.items() if weight not in base.names)
        if unmatched:
            raise ModelLoadError(f"{self._file.path}: these keys match nothing in the model: {', '.join(unmatched)}")
        for weight, delta in self._deltas.items():
            (a_rank, in_size), (out_size, b_rank) = self._file.shape(delta.a), self._file.shape(delta.b)
            if a_rank != b_rank or base.shape(weight) != (out_size, in_size):
                raise ModelLoadError(
                    f"{self._file.path}: '{delta.b}' {[out_size, b_rank]} times '{delta.a}' {[a_rank, in_size]} "
                    f"does not fit {base.label(weight)} with shape {list(base.shape(weight))}"
                )
        return LoraSource(base, self)

    def changes(self, weight: str) -> bool:
        """Whether the adapter adds something to this weight."""
        return weight in self._deltas

    def add_to(self, weight: str, values: Tensor) -> None:
        """Add scale * B @ A to `values`, float32 [out, in]."""
        delta = self._deltas[weight]
        a, b = self._file.read(delta.a).float(), self._file.read(delta.b).float()
        values.addmm_(b, a, alpha=delta.scale)

    def _pair_up(self, config: dict[str, Any]) -> dict[str, _Delta]:
        keys: dict[str, dict[str, str]] = {}
        unknown = []
        for key in sorted(self._file.names):
            match = _KEY.fullmatch(key)
            if match and match["module"].split(".")[-1] in TARGETS:
                keys.setdefault(match["module"], {})[match["side"]] = key
            else:
                unknown.append(key)
        if unknown:
            raise ModelLoadError(
                f"{self._file.path}: these keys are not LoRA weights of {', '.join(TARGETS)}: {', '.join(unknown)}"
            )
        if not keys:
            raise ModelLoadError(f"{self._file.path}: holds no LoRA weights")
        deltas = {}
        for module, sides in keys.items():
            if sides.keys() != {"A", "B"}:
                raise ModelLoadError(f"{self._file.path}: '{module}' has only one of lora_A and lora_B")
            for key in sides.values():
                if len(self._file.shape(key)) != 2:
                    raise ModelLoadError(f"{self._file.path}: '{key}' must be a matrix")
            rank = self._file.shape(sides["A"])[0]
            deltas[f"{module}.weight"] = _Delta(sides["A"], sides["B"], self._scale(config, module, rank))
        return deltas

    def _scale(self, config: dict[str, Any], module: str, rank: int) -> float:
        path = self.path / CONFIG_FILE
        stated_rank = _by_pattern(config, "rank_pattern", module, config.get("r"), path)
        if stated_rank != rank or rank < 1:
            raise ModelLoadError(f"{path}: '{module}' has rank {rank}, the configuration says {stated_rank!r}")
        alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"), path)
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ModelLoadError(f"{path}: lora_alpha must be a number, got {alpha!r}")
        return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


class LoraSource:
    """A model's tensors with an adapter's changes, a `TensorSource`.

    The sum is taken in float32, before the weight is rounded to the engine's type.
    """

    def __init__(self, base: TensorSource, adapter: LoraAdapter) -> None:
        self._base = base
        self._adapter = adapter
        self.names = base.names

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""
        return self._base.shape(name)

    def label(self, name: str) -> str:
        """See `TensorSource`."""
        return self._base.label(name)

    def copy_into(self, name: str, destination: Tensor) -> None:
        """See `TensorSource`."""
        if not self._adapter.changes(name):
            self._base.copy_into(name, destination)
            return
        values = torch.empty(self._base.shape(name), dtype=torch.float32)
        self._base.copy_into(name, values)
        self._adapter.add_to(name, values)
        destination.copy_(values)


def _check_features(config: dict[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ModelLoadError(f"{path}: peft_type {config.get('peft_type')!r} is not supported, 'LORA' is")
    for name in _REFUSED:
        if config.get(name):
            raise ModelLoadError(f"{path}: '{name}' = {config[name]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise ModelLoadError(f"{path}: bias {config['bias']!r} is not supported, 'none' is")
    initialisation = config.get("init_lora_weights", True)
    if initialisation not in _INITIALISATIONS:
        raise ModelLoadError(
            f"{path}: init_lora_weights {initialisation!r} is not supported, because it changes the base weights; "
            f"supported: {', '.join(map(repr, _INITIALISATIONS))}"
        )


def _by_pattern(config: dict[str, Any], field: str, module: str, default: object, path: Path) -> object:
    """The value of the first pattern that matches the module's name from some dot on, as in PEFT."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise ModelLoadError(f"{path}: {field} must map patterns to numbers, got {patterns!r}")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise ModelLoadError(f"{path}: {field} has an invalid pattern {pattern!r}: {error}") from error
    return default
