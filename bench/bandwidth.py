"""How fast memory can be read: a loop that does nothing else, which no kernel can beat."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numba
import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

Array = NDArray[Any]


def _sum(words: Any, threads: Any) -> Any:
    """Sum of int64, each thread a slice of its own. Integers may be added in any order, so the loop is all vectors."""
    totals = np.zeros(threads, np.int64)
    for thread in prange(threads):
        total = 0
        for i in range(words.size * thread // threads, words.size * (thread + 1) // threads):
            total += words[i]
        totals[thread] = total
    return totals.sum()


_compiled_sum = njit(parallel=True, nogil=True, cache=True)(_sum)


def arrays_of(weight: Any) -> Iterator[Array]:
    """The arrays behind a weight in any format."""
    if isinstance(weight, tuple):
        for part in weight:
            yield from arrays_of(part)
    else:
        yield weight


def read_seconds(arrays: Sequence[Array]) -> tuple[int, float]:
    """Read arrays once, one after another.

    Args:
        arrays: Contiguous. What is left of one after its last eight bytes is not read.

    Returns:
        Bytes that were read, and the seconds this took.
    """
    views = [array.reshape(-1).view(np.uint8) for array in arrays]
    words = [view[: view.size // 8 * 8].view(np.int64) for view in views]
    threads = numba.get_num_threads()
    _compiled_sum(np.zeros(8, np.int64), threads)  # compiled, and the threads awake
    start = time.perf_counter()
    for part in words:
        _compiled_sum(part, threads)
    return sum(part.nbytes for part in words), time.perf_counter() - start
