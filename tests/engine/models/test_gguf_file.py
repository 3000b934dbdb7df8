import importlib.util
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import ModelLoadError
from engine.models.checkpoint import DEFAULT_MODEL_FILE, DEFAULT_MODEL_PACKAGE
from engine.models.gguf_file import GgufFile
from tests.engine.models.tiny import make_tiny
from tests.engine.models.tiny_gguf import write_gguf

EXTRA = {
    "test.text": "żółć 🙂",
    "test.empty": "",
    "test.flag": True,
    "test.float": 0.1,
    "test.floats": [0.5, -1.25],
    "test.ints": [1, -2, 3],
    "test.flags": [True, False],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", make_tiny("llama", folder / "hf"), "llama", Q.Q8_0, metadata=EXTRA)
    return folder / "tiny.gguf"


def header_size(path: Path) -> int:
    """Bytes before the tensors' data."""
    return int(GGUFReader(path).data_offset)


def default_model() -> Path:
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / DEFAULT_MODEL_FILE


def assert_same_contents(path: Path) -> None:
    found, reference = GgufFile(path), GGUFReader(path)
    expected = {name: field.contents() for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    assert found.metadata == expected
    assert list(found.tensors) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        mine = found.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert mine.quantization == tensor.tensor_type
        assert mine.data.tobytes() == np.ascontiguousarray(tensor.data).tobytes()


def test_contents_equal_those_that_the_gguf_package_reads(tiny):
    assert_same_contents(tiny)


@pytest.mark.slow
def test_contents_of_the_default_model_equal_those_that_the_gguf_package_reads():
    assert_same_contents(default_model())


def test_typed_access_to_metadata(tiny):
    metadata = GgufFile(tiny).metadata
    assert metadata.string("test.text") == "żółć 🙂"
    assert metadata.integer("llama.block_count") == 3
    assert metadata.boolean("test.flag", False) is True
    assert metadata.strings("tokenizer.ggml.tokens")[3:5] == ["t3", "t4"]
    assert metadata.integers("test.ints") == [1, -2, 3]
    assert metadata.floats("test.floats") == [0.5, -1.25]


def test_typed_access_to_a_missing_key_gives_the_default(tiny):
    metadata = GgufFile(tiny).metadata
    assert metadata.string("test.missing") is None
    assert metadata.integer("test.missing") is None
    assert metadata.boolean("test.missing", True) is True
    assert metadata.boolean("test.missing", False) is False


@pytest.mark.parametrize(
    ("getter", "key", "message"),
    [
        ("string", "test.flag", r"tiny\.gguf: test\.flag must be a string"),
        ("integer", "test.flag", r"tiny\.gguf: test\.flag must be an integer"),
        ("integer", "test.float", r"test\.float must be an integer"),
        ("integers", "test.flags", r"test\.flags must be an array of integers"),
        ("strings", "test.ints", r"test\.ints must be an array of strings"),
        ("floats", "test.ints", r"test\.ints must be an array of floats"),
        ("integers", "test.text", r"test\.text is missing or no array"),
        ("strings", "test.missing", r"test\.missing is missing or no array"),
    ],
)
def test_typed_access_refuses_another_type_by_key(getter, key, message, tiny):
    metadata = GgufFile(tiny).metadata
    with pytest.raises(ModelLoadError, match=message):
        getattr(metadata, getter)(key)


def test_integers_of_every_width_are_read(tmp_path):
    writer = GGUFWriter(tmp_path / "widths.gguf", "llama")
    writer.add_uint8("uint8", 200)
    writer.add_int8("int8", -100)
    writer.add_uint16("uint16", 60_000)
    writer.add_int16("int16", -300)
    writer.add_int32("int32", -(2**31))
    writer.add_uint64("uint64", 2**63)
    writer.add_int64("int64", -(2**63))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    metadata = dict(GgufFile(tmp_path / "widths.gguf").metadata)

    del metadata["general.architecture"]
    assert metadata == {
        "uint8": 200,
        "int8": -100,
        "uint16": 60_000,
        "int16": -300,
        "int32": -(2**31),
        "uint64": 2**63,
        "int64": -(2**63),
    }


def test_a_missing_or_empty_file_is_refused_by_name(tmp_path):
    (tmp_path / "empty.gguf").touch()
    for name in ("missing.gguf", "empty.gguf"):
        with pytest.raises(ModelLoadError, match=name):
            GgufFile(tmp_path / name)


def test_every_truncation_is_an_error(tiny, tmp_path):
    content = tiny.read_bytes()
    lengths = random.Random(0).sample(range(header_size(tiny)), 300)
    path = tmp_path / "truncated.gguf"
    for length in [0, 3, 4, 8, 23, 24, *lengths, len(content) - 1000]:
        path.write_bytes(content[:length])

        with pytest.raises(ModelLoadError, match=r"truncated\.gguf"):
            GgufFile(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_error_or_leaves_every_tensor_inside_the_file(tiny, tmp_path, data):
    content = bytearray(tiny.read_bytes())
    position = data.draw(st.integers(0, header_size(tiny) - 1))
    damage = data.draw(st.binary(min_size=1, max_size=8))
    content[position : position + len(damage)] = damage
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)

    try:
        tensors = GgufFile(path).tensors
    except ModelLoadError:
        return
    assert all(tensor.data.nbytes <= len(content) for tensor in tensors.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "version 1 is not supported; supported: 2, 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "truncated or corrupt"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 2**62), "truncated or corrupt"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**62), "truncated or corrupt"),
        (b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 0, 1, 1, b"k", 8, 2**63), "truncated or corrupt"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQIQ", 3, 0, 1, 1, b"k", 9, 9, 1, 4, 0), "unknown metadata type 9 of array"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "unknown metadata type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIQI", 3, 1, 0, 1, b"t", 1, 32, 999), "999"),
        (b"GGUF" + struct.pack("<IQQQ1sII", 3, 1, 0, 1, b"t", 99, 0), "'t' has 99 dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 31, 2, 0), "not a multiple of 32"),
        (b"GGUF" + struct.pack("<IQQQ1sIQQIQ", 3, 1, 0, 1, b"t", 2, 2**62, 2**62, 0, 0), "truncated or corrupt"),
    ],
)
def test_a_malformed_file_is_refused(content, message, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)

    with pytest.raises(ModelLoadError, match=message):
        GgufFile(path)
