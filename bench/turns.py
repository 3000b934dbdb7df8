"""What it costs to share out a step's work among compute threads: by regions, or by turns of a team.

A region is a loop over `numba.prange` for each part; a team is launched once a step, see `engine.kernels.cpu.team`.
Every part is the same small computation for each thread. It is timed alone, and beside a Python thread that is busy
for a share of the time, as a server's event loop is: a region takes Python's lock when it begins. The two alternate.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
from numba import njit, prange

from bench.results import add_out_option, save, spread
from engine.kernels.cpu.team import finish, launch, make_progress, next_share

PERIOD_SECONDS = 0.01  # of which the Python thread is busy for a share
_APART = 16  # values of 64 bits from one thread's to the next one's


# Not cached: the cache would not find functions of a module that runs as a program.
@njit(nogil=True)
def _compute(value, steps):  # type: ignore[no-untyped-def]
    """Steps of a generator of random numbers, which wait for each other, six cycles each."""
    for _ in range(steps):
        value ^= value << 13
        value ^= value >> 7
        value ^= value << 17
    return value


@njit(parallel=True, nogil=True)
def _region(values, steps):  # type: ignore[no-untyped-def]
    for thread in prange(values.shape[0]):
        values[thread, 0] = _compute(values[thread, 0], steps)


@njit(nogil=True)
def in_regions(times, parts, values, steps, progress):  # type: ignore[no-untyped-def]
    """Each part a parallel region."""
    for _ in range(times * parts):
        _region(values, steps)


@njit(nogil=True)
def _take_turns(thread, parts, values, steps, progress):  # type: ignore[no-untyped-def]
    for turn in range(parts):
        share = next_share(progress, turn, thread)
        while share >= 0:
            values[share, 0] = _compute(values[share, 0], steps)
            finish(progress, turn, share)
            share = next_share(progress, turn, thread)


@njit(nogil=True)
def in_turns(times, parts, values, steps, progress):  # type: ignore[no-untyped-def]
    """So many launches, each part a turn in them."""
    for _ in range(times):
        progress[:] = 0
        launch(progress.shape[0], _take_turns, (parts, values, steps, progress))


SIDES: dict[str, Callable[..., None]] = {"regions": in_regions, "turns": in_turns}


@contextmanager
def busy_python(share: float) -> Iterator[None]:
    """A Python thread that computes for this share of each period while the body runs."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            end = time.perf_counter() + share * PERIOD_SECONDS
            while time.perf_counter() < end:
                sum(range(100))
            time.sleep((1 - share) * PERIOD_SECONDS)

    thread = threading.Thread(target=work)
    if share:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if share:
            thread.join()


def run(times: int, parts: int, steps: int, busy: list[float], rounds: int) -> list[dict[str, Any]]:
    """For each share of time that Python is busy: milliseconds of all parts once, and regions over turns."""
    threads = numba.get_num_threads()
    values, progress = np.ones((threads, _APART), np.int64), make_progress(threads)
    for side in SIDES.values():  # compiled
        side(1, 1, values, steps, progress)
    found: dict[tuple[float, str], list[float]] = {}
    for _ in range(rounds):
        for share in busy:
            with busy_python(share):
                for name, side in SIDES.items():
                    start = time.perf_counter()
                    side(times, parts, values, steps, progress)
                    found.setdefault((share, name), []).append(1e3 * (time.perf_counter() - start) / times)
    return [
        {
            "python_busy": share,
            **{f"{name}_ms": spread(found[share, name]) for name in SIDES},
            "speedup": round(statistics.median(found[share, "regions"]) / statistics.median(found[share, "turns"]), 2),
        }
        for share in busy
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.turns", description=__doc__)
    parser.add_argument("--parts", type=int, default=150, help="of a step (default: 150, as the default model had)")
    parser.add_argument("--steps", type=int, default=10000, help="of a part's computation (default: 10000)")
    parser.add_argument("--busy", type=float, nargs="+", default=[0.0, 0.05, 0.5], metavar="SHARE")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--times", type=int, default=100, help="all parts in a round (default: 100)")
    add_out_option(parser)
    options = parser.parse_args(arguments)
    if not all(0 <= share <= 1 for share in options.busy):
        parser.error(f"--busy must be within [0, 1], got {options.busy}")
    results = run(options.times, options.parts, options.steps, options.busy, options.rounds)
    print(json.dumps(results, indent=2))
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    settings["threads"] = numba.get_num_threads()
    print(f"Written to {save('turns', settings, results, options.out)}")


if __name__ == "__main__":
    main()
