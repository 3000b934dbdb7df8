"""Settings of all tests."""

import os

from hypothesis import settings

import engine  # noqa: F401  # before anything imports torch: it tunes the threads' waiting

import torch  # isort: skip

# Without a GPU, Triton kernels run in Triton's interpreter. It has to know before the first import of triton, and some
# libraries of other tests import it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The first example may have to wait for a kernel that is compiled, and machines differ.
settings.register_profile("siluette", deadline=None)
settings.load_profile("siluette")
