import gzip
import hashlib
import lzma
import os
import shutil
import stat
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pytest

from tests.training.packages import make_deb, make_tar, write_deb
from training.debian_packages import fetch_package, package_version, unpack_package
from training.errors import PackageError

FILES = {"usr/share/doc/odd/a.txt": b"odd", "usr/share/doc/odd/b/c.txt": b"", "usr/bin/even": b"even"}


def unpacked(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestUnpack:
    @pytest.mark.parametrize("compression", ["xz", "gz"])
    def test_all_files(self, tmp_path: Path, compression: str) -> None:
        deb = write_deb(tmp_path / "a.deb", FILES, compression)
        unpack_package(deb, tmp_path / "out")
        assert unpacked(tmp_path / "out") == FILES

    def test_an_uncompressed_archive(self, tmp_path: Path) -> None:
        deb = tmp_path / "a.deb"
        deb.write_bytes(make_deb({"debian-binary": b"2.0\n", "data.tar/": make_tar(FILES)}))
        unpack_package(deb, tmp_path / "out")
        assert unpacked(tmp_path / "out") == FILES

    @pytest.mark.parametrize(
        ("subtree", "names"),
        [
            ("usr/share/doc", ["usr/share/doc/odd/a.txt", "usr/share/doc/odd/b/c.txt"]),
            ("usr/share/doc/odd/b/", ["usr/share/doc/odd/b/c.txt"]),
            ("usr/bin/even", ["usr/bin/even"]),
        ],
    )
    def test_a_part(self, tmp_path: Path, subtree: str, names: list[str]) -> None:
        unpack_package(write_deb(tmp_path / "a.deb", FILES), tmp_path / "out", subtree)
        assert sorted(unpacked(tmp_path / "out")) == names

    def test_a_part_that_is_not_there(self, tmp_path: Path) -> None:
        deb = write_deb(tmp_path / "a.deb", FILES)
        with pytest.raises(PackageError, match="no files below 'usr/share/do'"):
            unpack_package(deb, tmp_path / "out", "usr/share/do")

    @pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
    @pytest.mark.parametrize("compression", ["xz", "zstd", "gzip"])
    def test_packages_of_dpkg(self, tmp_path: Path, compression: str) -> None:
        tree = tmp_path / "tree"
        for name, data in FILES.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(data)
        (tree / "DEBIAN").mkdir(mode=0o755)
        control = "Package: odd\nVersion: 1.0\nArchitecture: all\nMaintainer: N <n@example.org>\nDescription: odd\n"
        (tree / "DEBIAN" / "control").write_text(control)
        deb = tmp_path / "odd.deb"
        subprocess.run(["dpkg-deb", f"-Z{compression}", "--build", tree, deb], check=True, capture_output=True)
        unpack_package(deb, tmp_path / "out")
        assert unpacked(tmp_path / "out") == FILES

    @pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
    def test_a_compression_that_dpkg_cannot_read_either(self, tmp_path: Path) -> None:
        deb = tmp_path / "a.deb"
        deb.write_bytes(make_deb({"debian-binary": b"2.0\n", "data.tar.zst": b"no zstd"}))
        with pytest.raises(PackageError, match="dpkg-deb cannot read"):
            unpack_package(deb, tmp_path / "out")


class TestUnsafePackages:
    def test_a_path_that_leads_out_is_refused(self, tmp_path: Path) -> None:
        deb = write_deb(tmp_path / "a.deb", {"../../outside": b"x"})
        with pytest.raises(PackageError, match="outside"):
            unpack_package(deb, tmp_path / "in" / "out")
        assert not list(tmp_path.rglob("outside"))

    def test_an_absolute_path_stays_inside(self, tmp_path: Path) -> None:
        unpack_package(write_deb(tmp_path / "a.deb", {"/etc/x": b"x"}), tmp_path / "out")
        assert unpacked(tmp_path / "out") == {"etc/x": b"x"}

    def test_links_and_devices_are_left_out_and_no_file_is_setuid(self, tmp_path: Path) -> None:
        buffer = BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("fifo", tarfile.FIFOTYPE)):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "/etc/passwd"
                tar.addfile(member)
            member = tarfile.TarInfo("file")
            member.size, member.mode = 1, 0o4755
            tar.addfile(member, BytesIO(b"x"))
        deb = tmp_path / "a.deb"
        deb.write_bytes(make_deb({"data.tar.gz": gzip.compress(buffer.getvalue())}))
        unpack_package(deb, tmp_path / "out")
        assert os.listdir(tmp_path / "out") == ["file"]
        assert not (tmp_path / "out" / "file").stat().st_mode & stat.S_ISUID

    @pytest.mark.parametrize("compression", ["xz", "gz"])
    def test_damaged_files_are_refused(self, tmp_path: Path, compression: str) -> None:
        whole = write_deb(tmp_path / "a.deb", {"a": os.urandom(5000)}, compression).read_bytes()
        for data in (b"", b"no archive", whole[:-1000], whole[:100], whole[:2000] + b"\0" * 500 + whole[2500:]):
            (tmp_path / "b.deb").write_bytes(data)
            with pytest.raises(PackageError, match=r"b\.deb"):
                unpack_package(tmp_path / "b.deb", tmp_path / "out")

    def test_an_archive_without_data_is_no_package(self, tmp_path: Path) -> None:
        (tmp_path / "a.deb").write_bytes(make_deb({"debian-binary": b"2.0\n"}))
        with pytest.raises(PackageError, match=r"no data\.tar"):
            unpack_package(tmp_path / "a.deb", tmp_path / "out")


class Mirror:
    """A Debian mirror with one package."""

    def __init__(self, root: Path, url: str) -> None:
        self.root, self.url = root, url
        self.deb = write_deb(root / "pool" / "main" / "o" / "odd_1%3a2-3_all.deb", FILES)

    def publish(self, **fields: str) -> None:
        entry = {
            "Package": "odd",
            "Filename": "pool/main/o/odd_1%3a2-3_all.deb",
            "SHA256": hashlib.sha256(self.deb.read_bytes()).hexdigest(),
        }
        entry |= fields
        text = "\n".join(f"{key}: {value}" for key, value in entry.items() if value)
        others = "Package: odd-data\nFilename: other.deb\nSHA256: 0\nDescription: x\n Package: odd\n"
        path = self.root / "dists" / "stable" / "main" / "binary-amd64" / "Packages.xz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(f"{others}\n{text}\n\nPackage: even\n".encode()))


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def translate_path(self, path: str) -> str:
        return str(Path(self.directory) / path.lstrip("/"))  # names in a pool hold a literal %3a


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    root = tmp_path / "mirror"
    root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield Mirror(root, f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    thread.join()
    server.server_close()


class TestFetchFromMirror:
    def test_the_file_that_the_index_names(self, mirror: Mirror, tmp_path: Path) -> None:
        mirror.publish()
        path = fetch_package("odd", tmp_path / "new", mirror=mirror.url + "/")
        assert path == tmp_path / "new" / "odd_1%3a2-3_all.deb"
        assert path.read_bytes() == mirror.deb.read_bytes()
        assert package_version(path) == "1:2-3"
        assert os.listdir(tmp_path / "new") == [path.name]

    def test_a_file_that_is_there_already_is_not_fetched_again(self, tmp_path: Path) -> None:
        path = write_deb(tmp_path / "odd_1.0_all.deb", FILES)
        assert fetch_package("odd", tmp_path, mirror="http://127.0.0.1:9") == path

    def test_a_wrong_checksum_is_refused_and_leaves_nothing(self, mirror: Mirror, tmp_path: Path) -> None:
        mirror.publish(SHA256="0" * 64)
        with pytest.raises(PackageError, match=f"but the index says {'0' * 64}"):
            fetch_package("odd", tmp_path / "new", mirror=mirror.url)
        assert os.listdir(tmp_path / "new") == []

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"Package": "other"}, "lists no package odd"),
            ({"SHA256": ""}, "no field 'SHA256'"),
            ({"Filename": "pool/none_1_all.deb"}, "cannot fetch"),
            ({"Filename": "pool/main/o/../o/odd_1%3a2-3_all.deb/../../../../x.deb"}, "cannot fetch|file name"),
        ],
    )
    def test_an_index_that_does_not_fit(
        self, mirror: Mirror, tmp_path: Path, fields: dict[str, str], message: str
    ) -> None:
        mirror.publish(**fields)
        with pytest.raises(PackageError, match=message):
            fetch_package("odd", tmp_path / "new", mirror=mirror.url)

    def test_a_file_of_another_name_is_not_taken(self, mirror: Mirror, tmp_path: Path) -> None:
        shutil.copy(mirror.deb, mirror.root / "evil.deb")
        mirror.publish(Filename="evil.deb")
        with pytest.raises(PackageError, match=r"the file name of odd is 'evil\.deb'"):
            fetch_package("odd", tmp_path / "new", mirror=mirror.url)

    def test_a_suite_that_is_not_there(self, mirror: Mirror, tmp_path: Path) -> None:
        mirror.publish()
        with pytest.raises(PackageError, match=r"dists/sid/main/binary-amd64/Packages\.xz"):
            fetch_package("odd", tmp_path / "new", mirror=mirror.url, suite="sid")

    def test_no_mirror_and_no_apt(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(PackageError, match="there is no apt-get here; name a Debian mirror"):
            fetch_package("odd", tmp_path)


class TestFetchWithApt:
    def apt(self, folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A program called apt-get: the real one would need the network."""
        program = folder / "bin" / "apt-get"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    def test_the_file_goes_to_the_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.apt(tmp_path, 'test "$1" = download && echo data > "$2_1.0_all.deb"', monkeypatch)
        path = fetch_package("odd", tmp_path / "new")
        assert path == tmp_path / "new" / "odd_1.0_all.deb"
        assert os.listdir(tmp_path / "new") == [path.name]

    def test_what_apt_says_is_passed_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.apt(tmp_path, 'echo "E: Unable to locate package $2" >&2; exit 100', monkeypatch)
        with pytest.raises(PackageError, match="cannot download odd: E: Unable to locate package odd"):
            fetch_package("odd", tmp_path / "new")
        assert os.listdir(tmp_path / "new") == []
