"""Every example runs against a real server, and so do the examples of the client's README."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from clients.examples.plot_diversity import distinct_n
from tests.e2e.conftest import REPOSITORY, ServerProcess

EXAMPLES = REPOSITORY / "clients" / "examples"
README = REPOSITORY / "clients" / "python" / "README.md"
NEED_A_SERVER = pytest.mark.slow


def run(*command: str | Path, url: str = "") -> str:
    environment = {**os.environ, "SILUETTE_BASE_URL": url}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@NEED_A_SERVER
def test_openai_chat(server: ServerProcess) -> None:
    output = run(sys.executable, EXAMPLES / "openai_chat.py", server.url)
    answers = dict(re.findall(r"^(\d): (.*)$", output, re.MULTILINE))

    assert list(answers) == ["0", "1", "2"]
    assert len(set(answers.values())) > 1
    assert "'mode': 'stochastic', 'p': 0.7" in output
    assert repr(output.split("again: ")[1].removesuffix("\n")) == answers["0"]


@NEED_A_SERVER
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs the program curl")
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs the program bash")
def test_curl(server: ServerProcess) -> None:
    output = run("bash", EXAMPLES / "curl.sh", server.url)
    bodies = [json.loads(line) for line in output.splitlines() if line.startswith("{")]

    models, *completions, error = bodies
    assert models["data"][0]["id"] == server.model
    assert [answer["activation"]["mode"] for answer in completions] == ["silu", "stochastic", "relu"]
    assert all(answer["choices"][0]["text"] for answer in completions)
    assert error["error"]["param"] == "activation.p"
    assert "data: [DONE]" in output


@NEED_A_SERVER
def test_plot_diversity(server: ServerProcess, tmp_path: Path) -> None:
    picture = tmp_path / "diversity.svg"
    controls = ["-p", "1", "-p", "0.6", "--temperature", "0", "--temperature", "1.2"]
    lengths = ["--prompt", "My cat", "--samples", "4", "--max-tokens", "16"]
    script = EXAMPLES / "plot_diversity.py"
    output = run(sys.executable, script, "-o", picture, *controls, *lengths, url=server.url)

    curves = json.loads(output)
    for control in ("stochastic", "silu"):
        (same, diverse) = curves[control]["distinct_2"]
        assert 0 < same < diverse <= 1
    assert curves["stochastic"]["p"] == [1, 0.6]
    assert "<svg" in picture.read_text()


@NEED_A_SERVER
def test_the_readmes_examples_run(server: ServerProcess, tmp_path: Path) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(examples) >= 4
    for number, example in enumerate(examples):
        script = tmp_path / f"{number}.py"
        script.write_text(example)
        assert run(sys.executable, script, url=server.url).strip(), example


@pytest.mark.parametrize(
    ("samples", "n", "value"),
    [
        (["a b c", "A b d"], 2, 3 / 4),
        (["a b c", "a b c"], 2, 1 / 2),
        (["a b", "c d"], 2, 1),
        (["a a a a"], 1, 1 / 4),
        (["a", ""], 2, 0),
    ],
)
def test_distinct_n(samples: list[str], n: int, value: float) -> None:
    assert distinct_n(samples, n) == value


def test_more_equal_samples_are_less_diverse() -> None:
    values = [distinct_n(["the cat sat on the mat"] * count, 2) for count in (1, 2, 4)]

    assert all(more > fewer for more, fewer in pairwise(values))
