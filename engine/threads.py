"""Compute threads: one number for PyTorch and Numba."""

import os

import numba
import torch


def available_cores() -> int:
    """Cores this process may run on (a container's share counts, not the machine's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(count: int | None) -> int:
    """Let kernels called from this thread use `count` threads, one per core if None. Numba keeps the number per thread.

    Returns:
        The number in use.
    """
    count = min(count or available_cores(), numba.config.NUMBA_NUM_THREADS)
    torch.set_num_threads(count)
    numba.set_num_threads(count)
    return count
