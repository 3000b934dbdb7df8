"""The version that the server reports."""

from importlib.metadata import PackageNotFoundError, version


def _installed_version() -> str:
    try:
        return version("siluette")
    except PackageNotFoundError:  # run from a source tree without an installation
        return "0.0.0+source"


VERSION = _installed_version()
