"""What docs/operations.md counts with is what the code and the committed measurements say."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from engine.kv_cache import BLOCK_SIZE, block_bytes
from engine.models.config import DecoderConfig

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "operations.md").read_text()


def numbers_of(line: str) -> list[float]:
    cells = [cell.strip().replace(",", "") for cell in line.strip("|\n ").split("|")]
    return [float(cell) for cell in cells if re.fullmatch(r"[\d.]+", cell)]


def measured(peer: str) -> dict[str, Any]:
    results = json.loads((ROOT / "bench" / "results" / "peers-intel-xeon-2c.json").read_text())["results"]
    streams: dict[str, Any] = results["peers"][peer]["streams"]
    return streams


def test_memory_of_a_token_is_what_the_cache_takes() -> None:
    rows = [numbers_of(line) for line in PAGE.splitlines() if line.startswith("|")]
    rows = [row for row in rows if len(row) == 5]
    assert len(rows) == 6
    for layers, heads, dim, kib, tokens in rows:
        shape = cast(DecoderConfig, SimpleNamespace(num_layers=int(layers), kv_size=int(heads * dim)))
        size = block_bytes(shape, torch.bfloat16) / BLOCK_SIZE
        assert kib == size / 1024
        assert tokens == 2**30 // size


def test_speeds_are_the_committed_ones() -> None:
    for title, peer in (
        ("output tokens per second, bfloat16", "siluette-bf16"),
        ("output tokens per second, int8", "siluette-int8"),
    ):
        (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {title} ")]
        medians = [measured(peer)[streams]["tokens_per_second"]["median"] for streams in ("1", "8", "32")]
        assert numbers_of(line) == [round(median) for median in medians]


def test_the_fleet_is_counted_with_these_speeds() -> None:
    speed = measured("siluette-bf16")["32"]["tokens_per_second"]["median"]
    tokens = 1_000_000 / 60 * 128
    assert "2.1 million tokens/s" in PAGE
    assert round(tokens / 1e6, 1) == 2.1
    assert "2,800 such servers" in PAGE
    assert round(tokens / speed, -2) == 2800
    assert "4,000 at 70 %" in PAGE
    assert round(tokens / speed / 0.7, -2) == 4000
    assert "90,000 streams" in PAGE
    assert round(tokens / (speed / 32), -4) == 90_000
