from pathlib import Path

import gguf
import pytest

from engine.errors import ModelLoadError
from engine.gguf_metadata import read_metadata


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("test.uint8", 200)
    writer.add_int16("test.int16", -300)
    writer.add_uint64("test.uint64", 2**63)
    writer.add_float32("test.float32", 0.5)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "naïve 😀")
    writer.add_array("test.strings", ["a", "", "Ġb"])
    writer.add_array("test.integers", [1, -2, 3])
    writer.add_array("test.floats", [0.25, -1.0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_values_of_every_type_are_read(file: Path) -> None:
    metadata = read_metadata(file)
    assert metadata.string("general.architecture") == "llama"
    assert metadata.integer("test.uint8") == 200
    assert metadata.integer("test.int16") == -300
    assert metadata.integer("test.uint64") == 2**63
    assert metadata.boolean("test.bool", False) is True
    assert metadata.string("test.string") == "naïve 😀"
    assert metadata.strings("test.strings") == ["a", "", "Ġb"]
    assert metadata.integers("test.integers") == [1, -2, 3]
    assert metadata.floats("test.floats") == [0.25, -1.0]


def test_only_keys_with_the_prefix_are_kept(file: Path) -> None:
    metadata = read_metadata(file, "test.")
    assert metadata.string("general.architecture") is None
    assert metadata.string("test.string") is not None


def test_a_missing_key_gives_the_default(file: Path) -> None:
    metadata = read_metadata(file)
    assert metadata.integer("test.missing") is None
    assert metadata.boolean("test.missing", True) is True


def test_a_value_of_another_type_is_refused_by_key(file: Path) -> None:
    metadata = read_metadata(file)
    with pytest.raises(ModelLoadError, match=r"model\.gguf: test\.bool must be an integer"):
        metadata.integer("test.bool")
    with pytest.raises(ModelLoadError, match=r"test\.strings must be an array of integers"):
        metadata.integers("test.strings")
    with pytest.raises(ModelLoadError, match=r"test\.missing is missing"):
        metadata.strings("test.missing")


def test_a_file_cut_anywhere_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    end = whole.rindex(b"test.floats") + len(b"test.floats") + 4 + 4 + 8 + 2 * 4  # padding may follow
    cut = tmp_path / "cut.gguf"
    for length in range(end):
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
            read_metadata(cut)


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04 not a GGUF file at all",
        b"GGUF" + (1).to_bytes(4, "little") + bytes(16),
        b"GGUF" + (3).to_bytes(4, "big") + bytes(16),
    ],
    ids=["another format", "version 1", "big-endian"],
)
def test_another_format_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"other\.gguf"):
        read_metadata(path)


def test_lengths_beyond_the_file_are_refused(tmp_path: Path) -> None:
    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, "little")

    head = b"GGUF" + number(3, 4) + number(0, 8) + number(1, 8)
    key = number(1, 8) + b"k"
    path = tmp_path / "bad.gguf"
    bodies = {
        "string": number(8, 4) + number(2**63, 8),
        "array": number(9, 4) + number(4, 4) + number(2**62, 8),
        "nested": number(9, 4) + (number(9, 4) + number(1, 8)) * 50,
        "unknown type": number(99, 4),
    }
    for body in bodies.values():
        path.write_bytes(head + key + body)
        with pytest.raises(ModelLoadError, match=r"bad\.gguf"):
            read_metadata(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"missing\.gguf"):
        read_metadata(tmp_path / "missing.gguf")
