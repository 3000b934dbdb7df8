"""Functions that are compiled by themselves: called with what they should be, errors included, and found again."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit

from engine.kernels.cpu.separate import call_separately


@njit
def scale(values, by, out):  # type: ignore[no-untyped-def]
    if values.size != out.size:
        raise ValueError("sizes differ")
    for i in range(values.size):
        out[i] = values[i] * by


@njit
def scale_separately(values, by, out):  # type: ignore[no-untyped-def]
    call_separately(scale, (values, by, out))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_each_type_of_argument_meets_its_own_code(dtype: type) -> None:
    values, out = np.arange(5, dtype=dtype), np.zeros(5, dtype)

    scale_separately(values, dtype(3), out)

    np.testing.assert_array_equal(out, values * 3)


def test_an_exception_reaches_python() -> None:
    with pytest.raises(ValueError, match="sizes differ"):
        scale_separately(np.zeros(3), 2.0, np.zeros(4))


KERNELS = """
import numpy as np
from numba import njit
from engine.kernels.cpu.options import OPTIONS, UNCACHED
from engine.kernels.cpu.separate import call_separately
from engine.kernels.cpu.team import launch

@njit(**OPTIONS)
def leaf(out, i, value):
    out[i] = value

@njit(**UNCACHED)
def twig(out, i, value):
    call_separately(leaf, (out, i, value + i))

@njit(**OPTIONS)
def branch(thread, out, value):
    twig(out, thread, value)

@njit(**OPTIONS)
def tree(out, value):
    launch(out.size, branch, (out, value))

@njit(**OPTIONS)
def bush(out, value):
    twig(out, out.size - 3, value)

def main(function):
    out = np.zeros(3, np.int64)
    function(out, 7)
    print(out.tolist(), sum(function.stats.cache_hits.values()))
"""


def test_code_from_a_cache_finds_what_it_calls(tmp_path: Path) -> None:
    (tmp_path / "some_kernels.py").write_text(KERNELS)
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
    }

    def output_of(function: str) -> str:
        command = [sys.executable, "-c", f"import some_kernels as k; k.main(k.{function})"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    # What is inside two functions was compiled for the first of them, and the second is found in the cache at last.
    outputs = [output_of(function) for function in ("bush", "tree", "tree", "bush")]

    assert outputs == ["[7, 0, 0] 0", "[7, 8, 9] 0", "[7, 8, 9] 1", "[7, 0, 0] 1"]
