"""Programs from Debian packages, for tests: installed, or fetched and unpacked without being installed."""

import shutil
from pathlib import Path

import pytest

from training.debian_packages import fetch_package, unpack_package
from training.errors import PackageError


def find_program(name: str, package: str, cache: pytest.Cache) -> Path:
    """Path of a program; skips the test where neither this machine nor a Debian mirror has it.

    Args:
        name: Of the program.
        package: The Debian package that has it in usr/bin.
        cache: pytest's own, in which what was fetched is kept.
    """
    if installed := shutil.which(name):
        return Path(installed)
    folder = cache.mkdir("debian-packages")
    program = folder / package / "usr" / "bin" / name
    if not program.exists():
        try:
            unpack_package(fetch_package(package, folder), folder / package, "usr/bin")
        except PackageError as error:
            pytest.skip(f"{name} is not installed and cannot be fetched: {error}")
    return program
