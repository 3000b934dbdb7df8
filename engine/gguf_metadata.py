"""The key-value header of a GGUF file, read without its tensors.

`gguf.GGUFReader` makes an array object of every string; with 100,000 tokens and merges that takes two seconds, this
takes a tenth of that. Files are untrusted: every length is checked before it is used.
"""

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from engine.errors import ModelLoadError

Value = str | int | float | bool | list["Value"]
T = TypeVar("T")

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_ARRAY_DEPTH = 4


class GgufMetadata:
    """Metadata of one file with typed access. Every getter raises `ModelLoadError` when the value has another type."""

    def __init__(self, values: dict[str, Value], source: str) -> None:
        self._values = values
        self._source = source

    def string(self, key: str) -> str | None:
        """The string under `key`, None if the file has no such key."""
        return self._get(key, str, "a string")

    def integer(self, key: str) -> int | None:
        """The integer under `key`, None if the file has no such key."""
        return self._get(key, int, "an integer")

    def boolean(self, key: str, default: bool) -> bool:
        """The truth value under `key`, `default` if the file has no such key."""
        value = self._get(key, bool, "a boolean")
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

    def _get(self, key: str, kind: type[T], name: str) -> T | None:
        value = self._values.get(key)
        if value is None:
            return None
        if type(value) is not kind:  # exact: a bool is no integer here
            raise ModelLoadError(f"{self._source}: {key} must be {name}")
        return value

    def _list(self, key: str, kind: type[T], name: str) -> list[T]:
        value = self._values.get(key)
        if not isinstance(value, list):
            raise ModelLoadError(f"{self._source}: {key} is missing or no array")
        items: list[T] = [item for item in value if type(item) is kind]
        if len(items) != len(value):
            raise ModelLoadError(f"{self._source}: {key} must be an array of {name}")
        return items


def read_metadata(path: Path, prefix: str = "") -> GgufMetadata:
    """Read the metadata of a GGUF file (version 2 or 3, little-endian).

    Args:
        path: The file.
        prefix: Keep only keys that begin with this, such as `"tokenizer."`.

    Returns:
        The metadata.

    Raises:
        ModelLoadError: The file cannot be read or is not a sound GGUF file.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return GgufMetadata(_Parser(data).parse(prefix), path.name)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped: ValueError
        raise ModelLoadError(f"cannot read GGUF file {path}: {error}") from error


class _Parser:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._offset = 0

    def parse(self, prefix: str) -> dict[str, Value]:
        if self._data[:4] != _MAGIC:
            raise ValueError("it does not begin with 'GGUF'")
        self._offset = 4
        (version,) = self._unpack("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is not supported (only 2 and 3, little-endian)")
        _, count = self._unpack("QQ")
        values: dict[str, Value] = {}
        for _ in range(count):
            key = self._string()
            value = self._value(self._type())
            if key.startswith(prefix):
                values[key] = value
        return values

    def _unpack(self, layout: str) -> tuple[int, ...]:
        try:
            fields = struct.unpack_from(f"<{layout}", self._data, self._offset)
        except struct.error:
            raise ValueError("it ends in the middle of its metadata") from None
        self._offset += struct.calcsize(f"<{layout}")
        return fields

    def _type(self) -> int:
        return self._unpack("I")[0]

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        end = self._offset + length
        if end > len(self._data):
            raise ValueError("a string is longer than the file")
        text = self._data[self._offset : end].decode("utf-8")
        self._offset = end
        return text

    def _value(self, kind: int, depth: int = 0) -> Value:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            if depth == _MAX_ARRAY_DEPTH:
                raise ValueError("its arrays are nested too deeply")
            return self._array(depth + 1)
        if kind not in _SCALARS:
            raise ValueError(f"unknown metadata type {kind}")
        return self._unpack(_SCALARS[kind])[0]

    def _array(self, depth: int) -> list[Value]:
        kind = self._type()
        (count,) = self._unpack("Q")
        if count > len(self._data):  # each item takes at least one byte
            raise ValueError("an array is longer than the file")
        if kind in _SCALARS:
            return list(self._unpack(f"{count}{_SCALARS[kind]}"))
        read: Callable[[], Value] = self._string if kind == _STRING else lambda: self._value(kind, depth)
        return [read() for _ in range(count)]
