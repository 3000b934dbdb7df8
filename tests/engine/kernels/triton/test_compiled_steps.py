"""Every kernel of a step compiles for GPUs that are not there, and no step compiles anew."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[4]
KERNELS = {
    "_add_rows",
    "_attention",
    "_bounds",
    "_choose",
    "_embed",
    "_merge_splits",
    "_normalisers",
    "_product_kernel",
    "_rms_norm",
    "_rotate_and_cache",
    "_score",
}


@pytest.fixture(scope="module", params=[("80", "bfloat16"), ("90", "bfloat16"), ("90", "float32")], ids="-".join)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    capability, dtype = request.param
    folder = tmp_path_factory.mktemp("model")
    process = subprocess.run(
        [sys.executable, "-m", "tests.engine.kernels.triton.step_compiler", capability, dtype, str(folder)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return {**result, "dtype": dtype}


def test_every_kernel_compiles(compiled: dict[str, Any]) -> None:
    assert set(compiled["first"]) >= KERNELS


def test_another_number_of_rows_compiles_nothing(compiled: dict[str, Any]) -> None:
    """Else a request would wait for the compiler; and another kernel might round in another way."""
    assert compiled["later"] == compiled["first"]


def test_prompts_and_decoding_attend_by_one_kernel(compiled: dict[str, Any]) -> None:
    assert compiled["first"]["_attention"] == 1


def test_attention_meets_one_matrix_instruction(compiled: dict[str, Any]) -> None:
    """And none in float32, which it would round."""
    (instructions,) = compiled["instructions"].get("_attention", [[]])

    assert len(instructions) == (1 if compiled["dtype"] == "bfloat16" else 0)
