"""The CPU image, built by carrying out its Dockerfile in a clean Debian root, and run as strictly as Kubernetes can.

It takes minutes: a Debian and PyTorch are installed, and kernels are compiled. So it runs only when asked for, with
`pytest -m image`.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from scripts.rehearse_image import Stage, build, run_command
from tests.debian_programs import find_program

pytestmark = [pytest.mark.slow, pytest.mark.image]

DOCKERFILE = Path(__file__).parents[2] / "docker" / "cpu.Dockerfile"
BUILD_TOOLS = (
    *("cc", "c++", "gcc", "g++", "clang", "tcc", "cpp", "as", "ld", "make", "cmake", "ninja", "rustc", "cargo", "go"),
    *("pip", "pip3", "git"),
)
PATIENCE = 900.0  # seconds for a server to compile its kernels on a slow machine


@pytest.fixture(scope="module")
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a root file system with several owners needs Linux and root")
    folder = tmp_path_factory.mktemp("image")
    mmdebstrap = find_program("mmdebstrap", "mmdebstrap", request.config.cache)
    arguments = {} if reachable("https://download.pytorch.org/whl/cpu") else {"TORCH_INDEX": ""}
    return build(DOCKERFILE, folder / "root", arguments, f"perl {mmdebstrap}")


def reachable(url: str) -> bool:
    try:
        return httpx.head(url, timeout=5, follow_redirects=True).is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the containers keep, shared by the tests so that kernels are compiled once."""
    return tmp_path_factory.mktemp("volumes")


class Container:
    """A server that runs from the image.

    Attributes:
        pid: On the host, of the container's first process.
    """

    def __init__(self, image: Stage, volumes: Path, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = str(listener.getsockname()[1])
        command = run_command(
            image,
            volumes,
            [*image.entrypoint, *image.command],
            {"SILUETTE_PORT": self.port, "SILUETTE_HOST": "127.0.0.1"},
        )
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self.wait_for("Loading")
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.pid = int(children[0])

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while text not in self._log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no '{text}' (status {self.process.poll()}):\n{self._log.read_text()}")
            time.sleep(0.1)

    def stop(self) -> int:
        """What `docker stop` does first, and the exit status."""
        os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextmanager
def container(image: Stage, volumes: Path, log: Path) -> Iterator[Container]:
    running = Container(image, volumes, log)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()  # the container dies with it
            running.process.wait()


def test_no_build_tools_are_in_the_image(image: Stage) -> None:
    folders = [image.root / folder.lstrip("/") for folder in image.environment["PATH"].split(":")]
    programs = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()}
    assert "python" in programs
    assert "siluette" in programs
    assert programs.isdisjoint(BUILD_TOOLS)
    assert not any(re.fullmatch(r"(x86_64-linux-gnu-)?(gcc|g\+\+|cpp|ld)(-\d+)?", name) for name in programs)


def test_nothing_belongs_to_the_user_but_the_volumes(image: Stage) -> None:
    uid = int(image.user.split(":")[0])
    found = subprocess.run(["find", image.root, "-xdev", "-uid", str(uid)], check=True, capture_output=True, text=True)
    assert sorted(found.stdout.split()) == [f"{image.root}{volume}" for volume in image.volumes]


def test_it_serves_from_a_read_only_root_as_nobody_in_particular(image: Stage, volumes: Path, tmp_path: Path) -> None:
    with container(image, volumes, tmp_path / "log.txt") as server:
        probe = run_command(image, volumes, image.healthcheck, {"SILUETTE_PORT": server.port})
        assert subprocess.run(probe, capture_output=True, check=False).returncode != 0  # it still loads
        server.wait_for("Serving")

        assert subprocess.run(probe, capture_output=True, check=False).returncode == 0
        request = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"http://127.0.0.1:{server.port}/v1/completions", json=request, timeout=PATIENCE)
        assert answer.json()["usage"]["completion_tokens"] == 4

        status = Path(f"/proc/{server.pid}/status").read_text()
        assert re.search(r"^Uid:\t10001\t10001\t10001\t10001$", status, re.MULTILINE)
        assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
        assert re.search(r"^NSpid:\t\d+\t1$", status, re.MULTILINE)  # the first process of the container
        assert server.stop() == 0
    log = (tmp_path / "log.txt").read_text()
    assert "Warning" not in log
    assert list((volumes / "cache").rglob("*.nbc"))  # compiled kernels, for the next start


def test_it_can_be_stopped_while_it_loads(image: Stage, volumes: Path, tmp_path: Path) -> None:
    with container(image, volumes, tmp_path / "log.txt") as server:
        assert server.stop() == 128 + signal.SIGTERM
    assert "Serving" not in (tmp_path / "log.txt").read_text()
