"""A peer's server as a process: started, waited for, weighed and stopped."""

import asyncio
import os
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.peers_catalogue import HOST
from bench.peers_setup import PeerError, ending, last_words
from server.loadgen_client import RequestError, Target

POLL_SECONDS = 0.05
SAMPLE_SECONDS = 0.5
STOP_SECONDS = 30.0
REAP_SECONDS = 2.0  # until the end of a process that is dying is known
MIB = 2**20


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers.

    Attributes:
        target: Where it listens.
        pid: Its first process.
        seconds_to_ready: From the start of the process to the first good answer.
    """

    target: Target
    pid: int
    seconds_to_ready: float


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


@asynccontextmanager
async def running_server(
    command: Sequence[str], variables: Mapping[str, str], port: int, ready: str, timeout: float, folders: Sequence[Path]
) -> AsyncIterator[RunningServer]:
    """Start a server, wait until it answers, and stop it and all its processes at the end.

    Args:
        command: The command line, listening on `port`.
        variables: Environment variables on top of this process's own.
        port: A free port.
        ready: Path that answers 200 once the server can be used.
        timeout: Seconds that it may take for that.
        folders: Their paths are cut out of error messages.

    Raises:
        PeerError: It ended, or took longer. One raised within the block says so as well if the server has ended.
    """
    target = Target(HOST, port)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        start = time.perf_counter()
        try:
            # A session of its own, so that what it starts in turn can be stopped with it.
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **variables},
                start_new_session=True,
            )
        except OSError as error:
            raise PeerError(f"cannot start: {error.strerror}") from error

        def said() -> str:
            log.seek(0)
            return last_words(log.read(), folders)

        try:
            while not await _answers(target, ready):
                if process.returncode is not None:
                    raise PeerError(f"{ending(process.returncode)} before it was ready: {said()}")
                if time.perf_counter() - start > timeout:
                    raise PeerError(f"was not ready within {timeout:g} s: {said()}")
                await asyncio.sleep(POLL_SECONDS)
            try:
                yield RunningServer(target, process.pid, time.perf_counter() - start)
            except PeerError as error:
                with suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), REAP_SECONDS)
                if process.returncode is None:
                    raise
                raise PeerError(f"{ending(process.returncode)} ({error}): {said()}") from error
        finally:
            await _stop(process)


async def _answers(target: Target, path: str) -> bool:
    try:
        await target.fetch("GET", path)
    except RequestError as error:
        # Some health checks have an empty body: a good answer, though no JSON.
        return error.kind == "malformed" and "no JSON" in error.message
    return True


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
    deadline = time.perf_counter() + REAP_SECONDS
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # whatever is left of its session
        while time.perf_counter() < deadline:
            os.killpg(process.pid, 0)
            await asyncio.sleep(POLL_SECONDS)
    await process.wait()


def descendants(parents: Mapping[int, int], root: int) -> set[int]:
    """A process and all that it started.

    Args:
        parents: Process -> its parent.
        root: The first process.
    """
    found, edge = {root}, {root}
    while edge:
        edge = {process for process, parent in parents.items() if parent in edge} - found
        found |= edge
    return found


def parse_stat(text: str) -> tuple[int, int]:
    """Parent and resident pages of /proc/PID/stat. The program's name in it may hold blanks and brackets."""
    fields = text.rpartition(")")[2].split()
    return int(fields[1]), int(fields[21])


def resident_memory(root: int) -> int | None:
    """Resident bytes of a process and all that it started, pages that they share counted for each.

    Returns:
        None where the system has no /proc.
    """
    stats: dict[int, tuple[int, int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stats[int(path.parent.name)] = parse_stat(path.read_text(errors="replace"))
        except (OSError, ValueError, IndexError):  # it has ended meanwhile
            continue
    if root not in stats:
        return None
    tree = descendants({process: parent for process, (parent, _) in stats.items()}, root)
    return sum(stats[process][1] for process in tree) * os.sysconf("SC_PAGE_SIZE")


class MemoryWatch:
    """Samples the memory of a process and its children while a block runs.

    Attributes:
        peak: Most resident bytes seen; None if nothing could be seen.
    """

    def __init__(self, root: int) -> None:
        self.peak: int | None = None
        self._root = root

    async def __aenter__(self) -> "MemoryWatch":
        self._task = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _sample(self) -> None:
        while True:
            now = await asyncio.to_thread(resident_memory, self._root)
            if now is not None:
                self.peak = max(now, self.peak or 0)
            await asyncio.sleep(SAMPLE_SECONDS)
