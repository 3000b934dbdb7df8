"""Settings of all tests."""

import os

from hypothesis import settings


def keep_apart() -> None:
    """Give each of several test processes cores of its own, and what it starts.

    Compute threads wait for each other hundreds of times in a step. Where those of two processes share cores, each
    waits for a thread that is not running: ten times slower than one after the other. Tests of several threads still
    get them, on the same core.
    """
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if worker is None or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("NUMBA_NUM_THREADS", str(max(2, len(cores))))
    own = cores[int(worker.removeprefix("gw")) :: count]
    if own:
        os.sched_setaffinity(0, own)


keep_apart()  # before anything counts cores

import engine  # noqa: E402, F401  # before anything imports torch: it tunes the threads' waiting

import torch  # noqa: E402  # isort: skip

# Without a GPU, Triton kernels run in Triton's interpreter. It has to know before the first import of triton, and some
# libraries of other tests import it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The first example may have to wait for a kernel that is compiled, and machines differ.
settings.register_profile("siluette", deadline=None)
settings.load_profile("siluette")
