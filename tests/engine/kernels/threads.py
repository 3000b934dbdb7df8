"""Runs kernels on a given number of threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import numba
import pytest


@contextmanager
def numba_threads(count: int) -> Iterator[None]:
    """Numba kernels inside use `count` threads; the test is skipped where there are fewer."""
    if count > numba.config.NUMBA_NUM_THREADS:
        pytest.skip(f"needs {count} threads")
    before = numba.get_num_threads()
    numba.set_num_threads(count)
    try:
        yield
    finally:
        numba.set_num_threads(before)
