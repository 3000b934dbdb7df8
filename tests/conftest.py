"""Settings of all tests."""

import engine  # noqa: F401  # before anything imports torch: it tunes the threads' waiting
