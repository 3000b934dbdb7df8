"""A real server process with the default model."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
READY = re.compile(r"Serving (\S+) at (http://\S+)")


@dataclass(frozen=True)
class ServerProcess:
    """A server that runs, and where."""

    process: subprocess.Popen[bytes]
    model: str
    url: str
    log: Path

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()


def start_server(log: Path, *options: str) -> ServerProcess:
    """Start a server with the default model on a free port and wait until it listens."""
    # float32: there a request's tokens do not depend on its batch-mates, which is what these tests look for.
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--dtype", "float32", *options]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    while (ready := READY.search(log.read_text())) is None:
        if process.poll() is not None:
            pytest.fail(f"the server ended with status {process.returncode}:\n{log.read_text()}")
        time.sleep(0.1)
    return ServerProcess(process, ready[1], ready[2], log)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all tests that leave it as it was."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    server = start_server(log, "--allow-untuned-activations", "--max-num-seqs", "64")
    yield server
    assert server.stop() == 0, server.log.read_text()
