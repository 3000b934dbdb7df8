"""Settings of all tests."""

from hypothesis import settings

import engine  # noqa: F401  # before anything imports torch: it tunes the threads' waiting

settings.register_profile("siluette", deadline=None)  # no test may fail because a machine is busy
settings.load_profile("siluette")
