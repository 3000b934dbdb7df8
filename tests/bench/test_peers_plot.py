"""The picture of the peers."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="plots need the extra 'eval'")

from bench.peers_plot import plot
from bench.peers_results import Record
from bench.peers_session import Load, Session


def test_shows_who_was_measured(tmp_path: Path) -> None:
    rounds = [Session((Load(1, 4, 512, rate, None), Load(8, 8, 512, 3 * rate, None)), 5.0) for rate in (40.0, 50.0)]
    single = [Session((Load(1, 4, 512, 77.0, None),), 5.0)]
    records = {
        "siluette-bf16": Record("Siluette", "", sessions=rounds),
        "llama-bf16-capi": Record("llama.cpp", "", sessions=single),
        "vllm": Record("vLLM", "", errors=["not installed"]),
    }
    path = tmp_path / "new" / "peers.svg"
    plot({name: record.to_json() for name, record in records.items()}, path)
    texts = {
        "".join(element.itertext()).strip()
        for element in ElementTree.parse(path).iter()
        if element.tag.endswith("text")
    }
    assert {"Siluette", "llama.cpp", "1 stream", "8 streams", "45", "135", "77"} <= texts
    assert "vLLM" not in texts
