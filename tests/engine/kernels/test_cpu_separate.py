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
from engine.kernels.cpu.separate import call_separately
from engine.kernels.cpu.team import launch

@njit(cache=True)
def leaf(out, i, value):
    out[i] = value

@njit(cache=True)
def branch(thread, out, value):
    call_separately(leaf, (out, thread, value + thread))

@njit(cache=True)
def tree(out, value):
    launch(out.size, branch, (out, value))

def main():
    out = np.zeros(3, np.int64)
    tree(out, 7)
    print(out.tolist(), sum(tree.stats.cache_hits.values()))
"""


def test_code_from_a_cache_finds_what_it_calls(tmp_path: Path) -> None:
    (tmp_path / "some_kernels.py").write_text(KERNELS)
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
    }
    command = [sys.executable, "-c", "import some_kernels; some_kernels.main()"]

    outputs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]

    assert [output.stdout.strip() for output in outputs] == ["[7, 8, 9] 0", "[7, 8, 9] 1"]
