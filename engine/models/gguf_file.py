"""The contents of a GGUF file: its metadata, and its tensors as memory-mapped bytes.

`gguf.GGUFReader` builds several array objects for every vocabulary entry (1.5 s for the default model, 0.07 s here) and
takes data missing at the end of a file for an empty array. This reader checks every length against the size of the
file, so that a truncated or hostile file is an error at once. Block formats are left to the `gguf` package.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from engine.errors import ModelLoadError

MetadataValue: TypeAlias = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]
T = TypeVar("T")

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMENSIONS: Final = 4

_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9


class GgufMetadata(Mapping[str, MetadataValue]):
    """Metadata by key, with typed access. Each typed getter raises `ModelLoadError` if the value has another type.

    Args:
        values: Key to value; arrays are lists.
        path: The file, for error messages.
    """

    def __init__(self, values: Mapping[str, MetadataValue], path: Path) -> None:
        self._values = values
        self._path = path

    def __getitem__(self, key: str) -> MetadataValue:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def string(self, key: str) -> str | None:
        """The string under `key`, None if the file has no such key."""
        return self._typed(key, str, "a string")

    def integer(self, key: str) -> int | None:
        """The integer under `key`, None if the file has no such key."""
        return self._typed(key, int, "an integer")

    def boolean(self, key: str, default: bool) -> bool:
        """The truth value under `key`, `default` if the file has no such key."""
        value = self._typed(key, bool, "a boolean")
        return default if value is None else value

    def strings(self, key: str) -> list[str]:
        """The list of strings under `key`, which the file must have."""
        return self._list(key, str, "strings")

    def integers(self, key: str) -> list[int]:
        """The list of integers under `key`, which the file must have."""
        return self._list(key, int, "integers")

    def floats(self, key: str) -> list[float]:
        """The list of floats under `key`, which the file must have."""
        return self._list(key, float, "floats")

    def _typed(self, key: str, kind: type[T], name: str) -> T | None:
        value = self._values.get(key)
        if value is None:
            return None
        if type(value) is not kind:  # exact: a bool is no integer here
            raise ModelLoadError(f"{self._path}: {key} must be {name}")
        return value

    def _list(self, key: str, kind: type[T], name: str) -> list[T]:
        value = self._values.get(key)
        if not isinstance(value, list):
            raise ModelLoadError(f"{self._path}: {key} is missing or no array")
        items: list[T] = [item for item in value if type(item) is kind]
        if len(items) != len(value):
            raise ModelLoadError(f"{self._path}: {key} must be an array of {name}")
        return items


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor as it is stored.

    Attributes:
        shape: Row-major, so a linear weight is (out, in); the file lists dimensions the other way round.
        quantization: `gguf.GGMLQuantizationType`; its name is that of the format ("Q4_K").
        data: uint8 [..., bytes of a row], a read-only view of the file; blocks never span rows.
    """

    name: str
    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    data: NDArray[np.uint8]


class GgufFile:
    """An open GGUF file.

    Attributes:
        path: Where it lies.
        metadata: Key to value.
        tensors: Name to tensor, in the order of the file.

    Raises:
        ModelLoadError: Not a GGUF file, an unsupported version, truncated or corrupt.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            contents: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:  # ValueError: the file is empty
            raise ModelLoadError(f"{path}: cannot be read as a GGUF file: {error}") from error
        self._contents = contents.data
        self._offset = 0
        try:
            num_tensors, num_keys = self._read_preamble()
            self.metadata = GgufMetadata(dict(self._read_key_value() for _ in range(num_keys)), path)
            infos = [self._read_tensor_info() for _ in range(num_tensors)]
            self.tensors = {tensor.name: tensor for tensor in self._map_tensors(infos)}
        except (struct.error, ValueError, IndexError) as error:
            raise ModelLoadError(f"{path}: truncated or corrupt GGUF file: {error}") from error
        if len(self.tensors) != num_tensors:
            raise ModelLoadError(f"{path}: corrupt GGUF file: two tensors have the same name")

    def _read_preamble(self) -> tuple[int, int]:
        if bytes(self._take(4)) != MAGIC:
            raise ModelLoadError(f"{self.path}: not a GGUF file (it does not begin with 'GGUF')")
        version = self._unpack("I")
        if version & 0xFFFF == 0:
            raise ModelLoadError(f"{self.path}: big-endian GGUF files are not supported, little-endian ones are")
        if version not in VERSIONS:
            allowed = ", ".join(map(str, VERSIONS))
            raise ModelLoadError(f"{self.path}: GGUF version {version} is not supported; supported: {allowed}")
        return self._unpack("Q"), self._unpack("Q")

    def _take(self, size: int) -> memoryview:
        end = self._offset + size
        if end > len(self._contents):
            raise ValueError(f"{size} bytes wanted at offset {self._offset}, the file ends at {len(self._contents)}")
        taken = self._contents[self._offset : end]
        self._offset = end
        return taken

    def _unpack(self, code: str) -> int:
        size = struct.calcsize(f"<{code}")
        value: int = struct.unpack(f"<{code}", self._take(size))[0]
        return value

    def _read_string(self) -> str:
        return self._read_strings(1)[0]

    def _read_key_value(self) -> tuple[str, MetadataValue]:
        key = self._read_string()
        kind = self._unpack("I")
        return key, self._read_array() if kind == _ARRAY else self._read_scalar(kind)

    def _read_scalar(self, kind: int) -> int | float | bool | str:
        if kind == _STRING:
            return self._read_string()
        if kind not in _SCALARS:
            raise ValueError(f"unknown metadata type {kind}")
        return self._unpack(_SCALARS[kind])

    def _read_array(self) -> MetadataValue:
        kind, count = self._unpack("I"), self._unpack("Q")
        if kind == _STRING:
            return self._read_strings(count)
        if kind not in _SCALARS:
            raise ValueError(f"unknown metadata type {kind} of array elements")
        code = f"<{_SCALARS[kind]}"
        data = self._take(count * struct.calcsize(code))
        values: list[int] = np.frombuffer(data, dtype=np.dtype(code)).tolist()
        return values

    def _read_strings(self, count: int) -> list[str]:
        """Each after its length. Vocabularies have 100,000 of them: no calls of our own between two."""
        contents, offset, strings = self._contents, self._offset, []
        unpack_length = struct.Struct("<Q").unpack_from
        for _ in range(count):
            (length,) = unpack_length(contents, offset)
            start = offset + 8
            offset = start + length
            if offset > len(contents):
                raise ValueError(f"{length} bytes wanted at offset {start}, the file ends at {len(contents)}")
            strings.append(str(contents[start:offset], "utf-8"))
        self._offset = offset
        return strings

    def _read_tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._read_string()
        rank = self._unpack("I")
        if not 1 <= rank <= MAX_DIMENSIONS:
            raise ValueError(f"tensor '{name}' has {rank} dimensions")
        shape = tuple(self._unpack("Q") for _ in range(rank))[::-1]
        return name, shape, GGMLQuantizationType(self._unpack("I")), self._unpack("Q")

    def _map_tensors(self, infos: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]]) -> list[GgufTensor]:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment must be a power of two, got {alignment!r}")
        start = -(-self._offset // alignment) * alignment
        tensors = []
        for name, shape, quantization, offset in infos:
            block_size, block_bytes = GGML_QUANT_SIZES[quantization]
            if shape[-1] % block_size:
                raise ValueError(f"tensor '{name}' has rows of {shape[-1]} elements, not a multiple of {block_size}")
            stored = (*shape[:-1], shape[-1] // block_size * block_bytes)
            self._offset = start + offset
            data = np.frombuffer(self._take(math.prod(stored)), dtype=np.uint8).reshape(stored)
            tensors.append(GgufTensor(name, shape, quantization, data))
        return tensors
