"""Compute threads with cores of their own."""

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import numba
import numpy as np
import pytest

from engine.kernels.cpu.pinning import _list_threads, pin_compute_threads
from engine.threads import use_threads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


T = TypeVar("T")


def in_a_thread_of_its_own(work: Callable[[], T]) -> T:
    """Its compute threads are others than ours; cores are all that there are."""
    results: list[T] = []

    def run() -> None:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        results.append(work())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def cores_of_compute_threads() -> list[set[int]]:
    threads = np.zeros(numba.get_num_threads(), np.int64)
    _list_threads(threads)
    return [os.sched_getaffinity(thread) for thread in threads.tolist()]


@pytest.fixture
def two_cores() -> None:
    if (os.cpu_count() or 1) < 2 or numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("needs two cores")


@pytest.mark.usefixtures("two_cores")
def test_each_compute_thread_gets_a_core() -> None:
    def work() -> tuple[bool, list[set[int]]]:
        use_threads(2)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        return pin_compute_threads(), cores_of_compute_threads()

    before = os.sched_getaffinity(0)

    assert in_a_thread_of_its_own(work) == (True, [{core} for core in sorted(range(os.cpu_count() or 1))[:2]])
    assert os.sched_getaffinity(0) == before


@pytest.mark.usefixtures("two_cores")
def test_fewer_threads_than_cores_stay_free() -> None:
    def work() -> tuple[bool, list[set[int]]]:
        use_threads(1)
        return pin_compute_threads(), cores_of_compute_threads()

    assert in_a_thread_of_its_own(work) == (False, [set(range(os.cpu_count() or 1))])


def test_a_system_that_forbids_it_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(thread: int, cores: set[int]) -> None:
        raise PermissionError(1, "Operation not permitted")

    def work() -> bool:
        use_threads(1)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        monkeypatch.setattr(os, "sched_setaffinity", forbid)
        return pin_compute_threads()

    assert not in_a_thread_of_its_own(work)
