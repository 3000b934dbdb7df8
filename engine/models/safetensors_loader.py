"""Tensors of a Hugging Face folder: one `model.safetensors`, or the shards that an index lists."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import ModelLoadError
from engine.models.architectures import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
METADATA_PREFIX = "siluette."


class SafetensorsFile:
    """One memory-mapped file.

    Attributes:
        names: Its tensors.
        metadata: The `siluette.*` keys of its header.

    Raises:
        ModelLoadError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            handle: Any = safe_open(path, framework="pt")
            self.names = frozenset(handle.keys())
            metadata = handle.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise ModelLoadError(f"{path}: cannot be read as a safetensors file: {error}") from error
        self._handle = handle
        self.metadata = {key: text for key, text in metadata.items() if key.startswith(METADATA_PREFIX)}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._handle.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Read a tensor in the type it is stored in.

        Raises:
            ModelLoadError: Its type is not a plain floating-point one, or the file ends within it.
        """
        dtype = self._handle.get_slice(name).get_dtype()
        if dtype not in DTYPES:
            allowed = ", ".join(DTYPES)
            raise ModelLoadError(f"tensor '{name}' in {self.path} has type {dtype}; supported: {allowed}")
        try:
            tensor: Tensor = self._handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelLoadError(f"tensor '{name}' in {self.path} cannot be read: {error}") from error
        return tensor


class SafetensorsSource:
    """All tensors of a folder, a `TensorSource`.

    Attributes:
        metadata: The `siluette.*` keys of the headers.

    Raises:
        ModelLoadError: Files are missing, malformed or contradict the index.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = _open_files(folder)
        self.names = frozenset(self._files)
        self.metadata: dict[str, str] = {}
        for file in dict.fromkeys(self._files.values()):
            self.metadata.update(file.metadata)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""
        return self._files[name].shape(name)

    def label(self, name: str) -> str:
        """See `TensorSource`."""
        place = self._files[name].path if name in self._files else self._folder
        return f"tensor '{name}' in {place}"

    def copy_into(self, name: str, destination: Tensor) -> None:
        """See `TensorSource`."""
        destination.copy_(self._files[name].read(name))


def _open_files(folder: Path) -> dict[str, SafetensorsFile]:
    """The file that holds each tensor."""
    if (folder / SINGLE_FILE).is_file():
        file = SafetensorsFile(folder / SINGLE_FILE)
        return dict.fromkeys(file.names, file)
    if (folder / INDEX_FILE).is_file():
        return _open_shards(folder / INDEX_FILE)
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    found = f", only {pickled[0]}, which may run code when it is opened" if pickled else ""
    raise ModelLoadError(
        f"{folder}: no {SINGLE_FILE} or {INDEX_FILE}{found}; weights are read from safetensors and GGUF files only"
    )


def _open_shards(index: Path) -> dict[str, SafetensorsFile]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index}: 'weight_map' must map tensor names to file names")
    shards: dict[str, SafetensorsFile] = {}
    for name, file_name in weight_map.items():
        # A name with a path in it could make us read, and name in an error, any file of this machine.
        if not isinstance(file_name, str) or Path(file_name).name != file_name or "\\" in file_name:
            raise ModelLoadError(f"{index}: '{name}' lies in {file_name!r}, which is not a plain file name")
        if not file_name.endswith(".safetensors"):
            raise ModelLoadError(f"{index}: '{name}' lies in '{file_name}', which is not a .safetensors file")
        if file_name not in shards:
            shards[file_name] = SafetensorsFile(index.parent / file_name)
        if name not in shards[file_name].names:
            raise ModelLoadError(f"{index}: '{name}' should lie in {file_name}, which does not hold it")
    return {name: shards[file_name] for name, file_name in weight_map.items()}
