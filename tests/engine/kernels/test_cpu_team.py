"""Turns that threads take together: every share once, none before its turn, and without Python's lock."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
from numba import njit

from engine.kernels.cpu.options import INNER, OPTIONS
from engine.kernels.cpu.team import finish, launch, make_progress, next_share
from tests.engine.kernels.threads import numba_threads

TURNS = 200


@njit(**INNER)
def _add_neighbours(thread, progress, lines, computed):  # type: ignore[no-untyped-def]
    """Of each turn a line: a share adds up its neighbours' values of the turn before."""
    shares = progress.shape[0]
    for turn in range(lines.shape[0] - 1):
        share = next_share(progress, turn, thread)
        while share >= 0:
            lines[turn + 1, share] = lines[turn, share] + lines[turn, (share + 1) % shares] & 0xFFFF
            computed[turn, share] += 1
            finish(progress, turn, share)
            share = next_share(progress, turn, thread)


@njit(**OPTIONS)
def add_neighbours(threads, progress, lines, computed):  # type: ignore[no-untyped-def]
    progress[:] = 0
    launch(threads, _add_neighbours, (progress, lines, computed))


def in_turns(shares: int) -> tuple[np.ndarray, np.ndarray]:
    """What comes of it, and how often each share was computed."""
    lines, computed = np.zeros((TURNS + 1, shares), np.int64), np.zeros((TURNS, shares), np.int64)
    lines[0] = np.arange(shares) + 1
    add_neighbours(shares, make_progress(shares), lines, computed)
    return lines, computed


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shares", [1, 2, 3, 7, 50])
def test_a_turn_sees_all_of_the_one_before(shares: int, threads: int) -> None:
    with numba_threads(threads):  # fewer than there are shares: they take what is left over
        lines, computed = in_turns(shares)

    expected = [np.arange(shares) + 1]
    for _ in range(TURNS):
        expected.append(expected[-1] + np.roll(expected[-1], -1) & 0xFFFF)
    assert (computed == 1).all()
    np.testing.assert_array_equal(lines, expected)


def test_teams_of_several_python_threads_do_not_meet() -> None:
    expected, _ = in_turns(2)
    if numba.threading_layer() == "workqueue":
        pytest.skip("workqueue serves one thread at a time")

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(in_turns, [2] * 60))

    for lines, computed in results:
        assert (computed == 1).all()
        np.testing.assert_array_equal(lines, expected)


@njit(**INNER)
def _count(thread, counts):  # type: ignore[no-untyped-def]
    counts[thread] += 1


@njit(**OPTIONS)
def launch_often(times, begun, counts):  # type: ignore[no-untyped-def]
    begun[0] = 1
    for _ in range(times):
        launch(counts.size, _count, (counts,))


def test_a_launch_of_fewer_leaves_later_ones_their_threads() -> None:
    code = """
import numba, numpy as np
from tests.engine.kernels.test_cpu_team import launch_often
launch_often(1, np.zeros(1, np.int64), np.zeros(2, np.int64))
print(numba.get_num_threads())
"""
    environment = os.environ | {"NUMBA_NUM_THREADS": "4", "PYTHONPATH": os.pathsep.join(sys.path)}

    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    assert output.stdout.strip() == "4"


@njit(**INNER)
def _fail(thread, counts):  # type: ignore[no-untyped-def]
    if thread == 1:
        raise ValueError


@njit(**OPTIONS)
def launch_failing(counts):  # type: ignore[no-untyped-def]
    launch(counts.size, _fail, (counts,))


def test_an_exception_in_a_thread_ends_the_process_with_a_message() -> None:
    code = """
import numpy as np
from tests.engine.kernels.test_cpu_team import launch_failing
launch_failing(np.zeros(2, np.int64))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    failed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)

    assert failed.returncode == -signal.SIGABRT
    assert "_fail failed in a compute thread" in failed.stderr


def test_launches_do_not_wait_for_pythons_lock() -> None:
    begun, counts = np.zeros(1, np.int64), np.zeros(numba.get_num_threads(), np.int64)
    launch_often(1, begun, counts)
    begun[:], counts[:] = 0, 0
    holds_the_lock = ctypes.PyDLL(None)
    worker = threading.Thread(target=launch_often, args=(100, begun, counts))
    worker.start()
    while not begun[0]:
        time.sleep(0.001)

    holds_the_lock.usleep(900_000)
    finished = counts.copy()
    worker.join()

    assert (finished == 100).all()
