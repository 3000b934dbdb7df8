"""Debian packages as a source of text: fetch one by its name, and unpack a part of it without installing anything.

A .deb file is an `ar` archive that holds `data.tar`, compressed in one of several ways.
"""

import gzip
import hashlib
import io
import lzma
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, cast

import httpx

from training.errors import PackageError

AR_MAGIC = b"!<arch>\n"
AR_HEADER = 60
CHUNK = 1 << 20
TIMEOUT = httpx.Timeout(60.0, connect=20.0)


def fetch_package(
    name: str, folder: Path, *, mirror: str | None = None, suite: str = "stable", architecture: str = "amd64"
) -> Path:
    """Get the .deb file of a package, which is not installed.

    A file of that package that lies in `folder` already is taken as it is. Otherwise `apt-get download` fetches it,
    which checks the archive's signature; with `mirror`, that mirror's index is read instead, which works on any system
    and checks the SHA256 that the index states: this shows a damaged file, not a mirror that lies.

    Args:
        name: The package's name.
        folder: Where the file goes; created if it is missing.
        mirror: Address of a Debian mirror, such as `https://HOST/debian`.
        suite: Suite of the mirror: `stable`, or the name of a release.
        architecture: Architecture whose index of the mirror is read.

    Returns:
        Path of the .deb file.

    Raises:
        PackageError: The package cannot be had, or its file is not what the index promises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(folder.glob(f"{name}_*.deb"))
    if present:
        return present[-1]
    if mirror is not None:
        return _fetch_from_mirror(name, folder, mirror.rstrip("/"), suite, architecture)
    if shutil.which("apt-get") is None:
        raise PackageError(
            f"cannot fetch the package {name}: there is no apt-get here; name a Debian mirror (--mirror)"
        )
    return _fetch_with_apt(name, folder)


def package_version(deb: Path) -> str:
    """Version of a package from the name of its file, NAME_VERSION_ARCHITECTURE.deb."""
    parts = deb.stem.split("_")
    return parts[1].replace("%3a", ":") if len(parts) > 1 else "unknown"


def unpack_package(deb: Path, folder: Path, subtree: str = "") -> None:
    """Unpack the regular files of a .deb file. Links, devices and whatever lies outside `subtree` are left out.

    Args:
        deb: The package's file.
        folder: Files go below this folder, by their path in the package.
        subtree: Folder or file inside the package, such as `usr/share/doc`; "" is everything.

    Raises:
        PackageError: The file is no .deb file or damaged, `subtree` is not in it, or a path leads out of `folder`.
    """
    wanted = PurePosixPath(subtree)
    found = False
    try:
        with _data_tar(deb) as archive, tarfile.open(fileobj=archive, mode="r|") as tar:
            for member in tar:
                path = PurePosixPath(member.name.removeprefix("./").lstrip("/"))
                if member.isreg() and path.is_relative_to(wanted):
                    tar.extract(member, folder, filter="data")
                    found = True
            while archive.read(CHUNK):  # to the end, where the checksum is
                pass
    except (tarfile.TarError, lzma.LZMAError, zlib.error, OSError, EOFError) as error:
        raise PackageError(f"cannot unpack {deb}: {error}") from error
    if not found:
        raise PackageError(f"{deb} has no files below '{subtree}'")


def _data_tar(deb: Path) -> IO[bytes]:
    """The decompressed `data.tar` of a .deb file, as a stream."""
    for name, data in _ar_members(deb):
        if not name.startswith("data.tar"):
            continue
        match name:
            case "data.tar":
                return io.BytesIO(data)
            case "data.tar.xz":
                return lzma.open(io.BytesIO(data))
            case "data.tar.gz":
                return cast(IO[bytes], gzip.open(io.BytesIO(data)))
            case _:
                return _data_tar_of_dpkg(deb, name)
    raise PackageError(f"{deb} holds no data.tar: it is no Debian package")


def _ar_members(deb: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each member of an `ar` archive."""
    with deb.open("rb") as file:
        if file.read(len(AR_MAGIC)) != AR_MAGIC:
            raise PackageError(f"{deb} is no Debian package: it is no ar archive")
        while header := file.read(AR_HEADER):
            size = header[48:58].strip()
            if len(header) != AR_HEADER or header[58:] != b"`\n" or not size.isdigit():
                raise PackageError(f"{deb} is damaged: its ar archive has a malformed header")
            data = file.read(int(size))
            if len(data) != int(size):
                raise PackageError(f"{deb} is damaged: it ends too early")
            file.read(int(size) % 2)  # members begin at even offsets
            yield header[:16].decode("ascii", "replace").strip().rstrip("/"), data


def _data_tar_of_dpkg(deb: Path, name: str) -> IO[bytes]:
    """For compressions that this Python lacks, zstd above all. Only decompression: unpacking stays ours."""
    if shutil.which("dpkg-deb") is None:
        raise PackageError(f"cannot unpack {deb}: Python cannot decompress its {name} and there is no dpkg-deb here")
    run = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], capture_output=True, check=False)
    if run.returncode != 0:
        raise PackageError(f"dpkg-deb cannot read {deb}: {_last_line(run.stderr)}")
    return io.BytesIO(run.stdout)


def _fetch_with_apt(name: str, folder: Path) -> Path:
    # A folder of its own: apt-get does not say what the file is called, and a partial file must not be taken later.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        run = subprocess.run(["apt-get", "download", name], cwd=temporary, capture_output=True, check=False)
        files = list(Path(temporary).glob("*.deb"))
        if run.returncode != 0 or not files:
            raise PackageError(
                f"apt-get cannot download {name}: {_last_line(run.stderr)}. Run `apt-get update`, or name a Debian "
                "mirror (--mirror)"
            )
        return files[0].rename(folder / files[0].name)


def _fetch_from_mirror(name: str, folder: Path, mirror: str, suite: str, architecture: str) -> Path:
    index_url = f"{mirror}/dists/{suite}/main/binary-{architecture}/Packages.xz"
    try:
        index = lzma.decompress(_get(index_url)).decode("utf-8", "replace")
    except lzma.LZMAError as error:
        raise PackageError(f"{index_url} is no xz file: {error}") from error
    stanza = _find_stanza(index, name)
    if stanza is None:
        raise PackageError(f"{index_url} lists no package {name}")
    try:
        path, digest = stanza["Filename"], stanza["SHA256"].lower()
    except KeyError as error:
        raise PackageError(f"{index_url}: the entry of {name} has no field {error}") from None
    data = _get(f"{mirror}/{path}")
    actual = hashlib.sha256(data).hexdigest()
    if actual != digest:
        raise PackageError(f"{mirror}/{path} has the SHA256 {actual}, but the index says {digest}")
    target = folder / PurePosixPath(path).name
    if not target.name.startswith(f"{name}_"):
        raise PackageError(f"{index_url}: the file name of {name} is '{path}'")
    partial = target.with_suffix(".partial")
    partial.write_bytes(data)
    return partial.rename(target)


def _find_stanza(index: str, name: str) -> dict[str, str] | None:
    """Fields of a package's entry in a Packages index (continuation lines are of no use here)."""
    start = f"\n{index}".find(f"\nPackage: {name}\n")
    if start < 0:
        return None
    stanza = index[start:].split("\n\n", 1)[0]
    fields = (line.split(": ", 1) for line in stanza.split("\n") if ": " in line and not line.startswith(" "))
    return {key: value.strip() for key, value in fields}


def _get(url: str) -> bytes:
    try:
        response = httpx.get(url, timeout=TIMEOUT, follow_redirects=True)
        response.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise PackageError(f"cannot fetch {url}: {error}") from error
    return response.content


def _last_line(output: bytes) -> str:
    lines = output.decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"
