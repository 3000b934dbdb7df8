"""Compute threads: one number for PyTorch and Numba."""

import os
from pathlib import Path

import numba
import torch

CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # "QUOTA PERIOD" in microseconds, or "max PERIOD"


def available_cores() -> int:
    """Cores this process may use: of the machine, of its CPU set, and of its container's quota, the fewest."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU_MAX.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def use_threads(count: int | None) -> int:
    """Let kernels called from this thread use `count` threads, one per core if None. Numba keeps the number per thread.

    Returns:
        The number in use.
    """
    count = min(count or available_cores(), numba.config.NUMBA_NUM_THREADS)
    torch.set_num_threads(count)
    numba.set_num_threads(count)
    return count
