"""One core for each compute thread, so that a busy neighbour slows decoding down less.

Compute threads wait for each other hundreds of times in a step. Left alone, Linux puts two of them on one core when
another program is busy on the other: then each of those waits is for a thread that cannot run. On a core of its own a
thread shares with the neighbour only.
"""

import os
import platform
from contextlib import suppress

import numba
import numpy as np
import torch
from numba import njit, types

from engine.kernels.cpu.options import INNER, OPTIONS
from engine.kernels.cpu.team import launch


def pin_compute_threads() -> bool:
    """Pin the compute threads that kernels called from this thread use, this one among them.

    Threads that this one starts from now on inherit its core. Where there are fewer compute threads than cores nothing
    is done: another process may have chosen the same ones. Needs Linux.

    Returns:
        Whether each has a core of its own now.
    """
    count = numba.get_num_threads()
    if platform.system() != "Linux":
        return False
    cores = sorted(os.sched_getaffinity(0))
    if count != len(cores):
        return False
    torch.empty(1 << 20).fill_(0)  # PyTorch starts its own threads now, which stay free to move
    threads = np.zeros(count, np.int64)
    _list_threads(threads)
    if len(set(threads.tolist())) != count:
        return False
    try:
        for thread, core in zip(threads.tolist(), cores, strict=True):
            os.sched_setaffinity(thread, {core})
    except OSError:  # a sandbox that forbids it: all may run anywhere again
        with suppress(OSError):
            for thread in threads.tolist():
                os.sched_setaffinity(thread, cores)
        return False
    return True


if platform.system() == "Linux":
    _get_thread = types.ExternalFunction("gettid", types.int32())

    @njit(**INNER)
    def _list_thread(thread, out):  # type: ignore[no-untyped-def]
        out[thread] = _get_thread()

    @njit(**OPTIONS)
    def _list_threads(out):  # type: ignore[no-untyped-def]
        """The system's number of each compute thread."""
        launch(len(out), _list_thread, (out,))
