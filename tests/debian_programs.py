"""Programs from Debian that tests run: the system's own, or unpacked from the package, without root and uninstalled."""

import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

from training.debian_packages import fetch_package, unpack_package
from training.errors import PackageError

SYSTEM_FOLDERS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # PATH of a user may lack sbin


def find_program(name: str, package: str, cache: pytest.Cache) -> Path:
    """Path of a program. The test is skipped if it is neither installed nor to be had, or does not run here.

    Args:
        name: The program.
        package: The Debian package that has it.
        cache: pytest's own, in which what was fetched is kept.
    """
    installed = shutil.which(name, path=SYSTEM_FOLDERS)
    if installed is not None:
        return Path(installed)
    folder = cache.mkdir("debian-packages") / package
    with FileLock(folder.with_suffix(".lock")):  # tests run in several processes
        if not _programs(folder, name):
            try:
                unpack_package(fetch_package(package, folder.parent), folder)
            except PackageError as error:
                pytest.skip(f"{name} is not installed, and its Debian package cannot be fetched: {error}")
    (program,) = _programs(folder, name)
    missing = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    if "not found" in missing:
        pytest.skip(f"{name} from the Debian package does not run here:\n{missing}")
    return program


def _programs(folder: Path, name: str) -> list[Path]:
    return [path for path in folder.rglob(f"*bin/{name}") if path.is_file()]
