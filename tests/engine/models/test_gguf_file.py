import importlib.util
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import GGUFReader
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
