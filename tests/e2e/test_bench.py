"""`siluette bench` against a real server process with the default model."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import REPOSITORY, ServerProcess

pytestmark = pytest.mark.slow


@pytest.fixture
def url(server: ServerProcess) -> str:
    while True:
        try:
            httpx.get(f"{server.url}/health/ready", timeout=None).raise_for_status()
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return server.url


def bench(url: str, arguments: str, json_path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server.cli", "bench", "--base-url", url, "--json", str(json_path)]
    command += arguments.split()
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_prompts_and_answers_have_exactly_the_lengths_that_were_asked_for(
    url: str, endpoint: str, tmp_path: Path
) -> None:
    path = tmp_path / "result.json"
    lengths = "--num-requests 6 --concurrency 3 --prompt-tokens 64 --output-tokens 8 --warmup 0"
    result = bench(url, f"{lengths} --mode-mix silu,stochastic,relu --endpoint {endpoint}", path)
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(path.read_text())
    assert document["exact_prompts"]
    assert document["total"]["input_tokens"] == 6 * 64
    assert document["total"]["output_tokens"] == 6 * 8
    assert {mode: group["completed"] for mode, group in document["by_mode"].items()} == {
        "silu": 2,
        "stochastic": 2,
        "relu": 2,
    }
    assert document["machine"]["cores"] >= 1
    assert document["client_cpu_seconds"] < document["duration"]
    assert "First token" in result.stdout


def test_prefix_cache_helps_with_the_shared_prefix_only(url: str, tmp_path: Path) -> None:
    cached = {}
    for shared in (0, 48):
        path = tmp_path / f"{shared}.json"
        lengths = "--num-requests 4 --concurrency 1 --prompt-tokens 64 --output-tokens 2 --warmup 0"
        result = bench(url, f"{lengths} --shared-prefix-tokens {shared}", path)
        assert result.returncode == 0, result.stderr
        cached[shared] = json.loads(path.read_text())["total"]["cached_tokens"]
    assert cached == {0: 0, 48: 4 * 48}


def test_mode_that_the_server_refuses_ends_with_its_message(url: str, tmp_path: Path) -> None:
    result = bench(url, "--num-requests 1 --mode-mix stochastic -p 1.5", tmp_path / "result.json")
    assert result.returncode == 2
    assert "activation.p must be a number in [0, 1], got 1.5" in result.stderr
    assert not (tmp_path / "result.json").exists()
