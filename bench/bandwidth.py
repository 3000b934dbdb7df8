"""How fast memory can be read: loops that do nothing else."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numba
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from engine.kernels.cpu.rows import prefetch

Array = NDArray[Any]

PLACES, BLOCK, AHEAD, LINE = 4, 64, 256, 8  # the last three in words of eight bytes; a line is one of the cache


def _straight(words: Any, threads: Any) -> Any:
    """Sum of int64, each thread a slice of its own. Integers may be added in any order, so the loop is all vectors."""
    totals = np.zeros(threads, np.int64)
    for thread in prange(threads):
        part = words[words.size * thread // threads : words.size * (thread + 1) // threads]
        total = 0
        for i in range(part.size):
            total += part[i]
        totals[thread] = total
    return totals.sum()


def _ahead(words: Any, threads: Any) -> Any:
    """The same from several places of a slice in turn, each fetched ahead: more lines are on their way at once."""
    totals = np.zeros(threads, np.int64)
    for thread in prange(threads):
        part = words[words.size * thread // threads : words.size * (thread + 1) // threads]
        each = part.size // PLACES // BLOCK * BLOCK
        total = 0
        for first in range(0, each, BLOCK):
            for place in range(PLACES):
                at = place * each + first
                for line in range(0, BLOCK, LINE):
                    prefetch(part, at + line + AHEAD)
                block = part[at : at + BLOCK]
                for i in range(BLOCK):
                    total += block[i]
        rest = part[PLACES * each :]
        for i in range(rest.size):
            total += rest[i]
        totals[thread] = total
    return totals.sum()


# Which is faster depends on the processor.
LOOPS = tuple(njit(parallel=True, nogil=True, cache=True)(loop) for loop in (_straight, _ahead))


def arrays_of(weight: Any) -> Iterator[Array]:
    """The arrays behind a weight in any format."""
    if isinstance(weight, tuple):
        for part in weight:
            yield from arrays_of(part)
    else:
        yield weight


def read_seconds(arrays: Sequence[Array]) -> tuple[int, float]:
    """Read arrays, one after another, once with each loop.

    Args:
        arrays: Contiguous. What is left of one after its last eight bytes is not read.

    Returns:
        Bytes of the arrays that are read, and the seconds that the faster loop takes for them.
    """
    views = [array.reshape(-1).view(np.uint8) for array in arrays]
    words = [view[: view.size // 8 * 8].view(np.int64) for view in views]
    threads = numba.get_num_threads()
    return sum(part.nbytes for part in words), min(_seconds(loop, words, threads) for loop in LOOPS)


def _seconds(loop: Callable[[Array, int], int], words: Sequence[Array], threads: int) -> float:
    loop(np.zeros(BLOCK, np.int64), threads)  # compiled, and the threads awake
    start = time.perf_counter()
    for part in words:
        loop(part, threads)
    return time.perf_counter() - start
