"""Settings of all tests."""

from hypothesis import settings

import engine  # noqa: F401  # before anything imports torch: it tunes the threads' waiting

# The first example may have to wait for a kernel that is compiled, and machines differ.
settings.register_profile("siluette", deadline=None)
settings.load_profile("siluette")
