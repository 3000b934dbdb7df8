"""Servers as processes. The server here is Python's own for files, which is nobody's peer."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from bench.peers_server import (
    MemoryWatch,
    RunningServer,
    descendants,
    free_port,
    parse_stat,
    resident_memory,
    running_server,
)
from bench.peers_setup import PeerError
from server.loadgen_client import RequestError

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def serve(
    command: Sequence[str], port: int, timeout: float = 300, folders: Sequence[Path] = ()
) -> AbstractAsyncContextManager[RunningServer]:
    return running_server([sys.executable, *command], {"GREETING": "hello"}, port, "/", timeout, folders)


async def test_server_is_ready_when_it_answers_and_gone_at_the_end() -> None:
    port = free_port()
    async with serve(["-m", "http.server", str(port), "--bind", "127.0.0.1"], port) as server:
        assert server.seconds_to_ready > 0
        assert server.target.port == port
        with pytest.raises(RequestError) as caught:
            await server.target.fetch("GET", "/no-such-file")
        assert caught.value.kind == "http_404"
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


async def test_its_end_is_told_with_its_last_words_and_without_paths(tmp_path: Path) -> None:
    script = f"import os, sys; sys.exit(os.environ['GREETING'] + ', no such file: {tmp_path}/model')"
    with pytest.raises(PeerError, match=r"exit 1 before it was ready: hello, no such file: model"):
        async with serve(["-c", script], free_port(), folders=[tmp_path]):
            pass


async def test_an_end_under_load_is_told_with_what_failed() -> None:
    port = free_port()
    with pytest.raises(PeerError, match=r"was ended by SIGKILL \(a request failed\): "):  # noqa: PT012  (one block)
        async with serve(["-m", "http.server", str(port), "--bind", "127.0.0.1"], port) as server:
            os.kill(server.pid, signal.SIGKILL)
            raise PeerError("a request failed")


async def test_a_failure_alone_is_passed_on() -> None:
    port = free_port()
    with pytest.raises(PeerError, match=r"^a request failed$"):
        async with serve(["-m", "http.server", str(port), "--bind", "127.0.0.1"], port):
            raise PeerError("a request failed")


async def test_a_program_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(PeerError, match="cannot start: No such file"):
        async with running_server(["no-such-program"], {}, free_port(), "/", 1, []):
            pass


async def test_what_never_answers_is_stopped_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    script = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"with open({str(pids)!r} + '.new', 'w') as file: file.write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"os.rename({str(pids)!r} + '.new', {str(pids)!r})\n"
        "time.sleep(600)"
    )
    timeout = 1.0
    while not pids.exists():  # a slow machine may need longer to write the file
        with pytest.raises(PeerError, match="was not ready within"):
            async with serve(["-c", script], free_port(), timeout):
                pass
        timeout *= 2
    while any(_alive(pid) for pid in map(int, pids.read_text().split())):
        await asyncio.sleep(0.01)


def _alive(pid: int) -> bool:
    """A killed process whose parent has not asked for it yet is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_stat_is_read_behind_the_name() -> None:
    fields = " ".join(str(number) for number in range(5, 60))
    assert parse_stat(f"12 (a (b) c) S 4 {fields}") == (4, 24)


def test_descendants_are_children_and_theirs() -> None:
    assert descendants({2: 1, 3: 2, 4: 3, 5: 1, 6: 6}, 2) == {2, 3, 4}


@needs_proc
def test_memory_counts_children() -> None:
    alone = resident_memory(os.getpid())
    assert alone is not None
    script = "data = b'x' * 200_000_000; print(len(data), flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "200000000\n"
        together = resident_memory(os.getpid())
        assert together is not None
        assert together > alone + 200_000_000
        assert child.stdin is not None
        child.stdin.write("\n")


@needs_proc
async def test_watch_keeps_the_peak() -> None:
    async with MemoryWatch(os.getpid()) as watch:
        while watch.peak is None:
            await asyncio.sleep(0.01)
    assert watch.peak > 1_000_000


@needs_proc
def test_memory_of_what_has_ended_is_unknown() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert resident_memory(child.pid) is None
