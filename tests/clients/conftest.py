"""Real servers for the client's tests, and a relay that does to their answers what networks do."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import ServerProcess, start_server

PROMPT = "Once upon a time there was"
PATIENCE = 120.0  # seconds until a test that waits for a state gives up; generous, for slow and busy machines


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all tests that leave it as it was."""
    log = tmp_path_factory.mktemp("client-server") / "log.txt"
    server = start_server(log, "--kv-cache-mib", "512")
    yield server
    assert server.stop() == 0, server.log.read_text()


@pytest.fixture(scope="module")
def narrow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with room for one running and one waiting sequence."""
    log = tmp_path_factory.mktemp("narrow-server") / "log.txt"
    server = start_server(log, "--kv-cache-mib", "256", "--max-num-seqs", "1", "--max-waiting", "1")
    yield server
    assert server.stop() == 0, server.log.read_text()


class Metrics:
    """What a server's `/metrics` says now."""

    def __init__(self, url: str) -> None:
        self._url = url

    def value(self, name: str, **labels: str) -> float:
        """Sum of the samples that have these labels."""
        text = httpx.get(f"{self._url}/metrics", timeout=PATIENCE).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    @property
    def running(self) -> float:
        """Sequences in the batch."""
        return self.value("siluette_requests_running")

    @property
    def waiting(self) -> float:
        """Sequences in the queue."""
        return self.value("siluette_requests_waiting")

    @property
    def aborted(self) -> float:
        """Requests whose client left."""
        return self.value("siluette_requests_total", finish_reason="abort")

    @property
    def refused(self) -> float:
        """Answers with status 429."""
        return self.value("siluette_http_requests_total", status="429")

    def wait_until(self, condition: Callable[["Metrics"], bool]) -> None:
        """Wait for a state, and fail if it does not come."""
        deadline = time.monotonic() + PATIENCE
        while not condition(self):
            if time.monotonic() > deadline:
                pytest.fail(f"running {self.running}, waiting {self.waiting}, aborted {self.aborted}")
            time.sleep(0.02)


@pytest.fixture
def metrics(server: ServerProcess) -> Metrics:
    return Metrics(server.url)


Treat = Callable[[int, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""What a relay does to the answer of its n-th connection, counted from 0."""


@dataclass
class Relay:
    """A TCP relay before a server: requests pass as they are, answers as `treat` lets them.

    Attributes:
        requests: The bytes that clients have sent, by connection.
    """

    url: str = ""
    requests: list[bytearray] = field(default_factory=list)


async def byte_by_byte(number: int, answer: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
    while data := await answer.read(65536):
        for byte in data:
            client.write(bytes([byte]))
            await client.drain()
            await asyncio.sleep(0)


async def untouched(number: int, answer: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
    while data := await answer.read(65536):
        client.write(data)
        await client.drain()


@asynccontextmanager
async def relay_to(url: str, treat: Treat = untouched) -> AsyncIterator[Relay]:
    """A relay on a port of its own."""
    target = httpx.URL(url)
    relay = Relay()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sent: bytearray) -> None:
        while data := await reader.read(65536):
            sent += data
            writer.write(data)
            await writer.drain()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, sent = len(relay.requests), bytearray()
        relay.requests.append(sent)
        answer, request = await asyncio.open_connection(target.host, target.port)
        forwarding = asyncio.create_task(forward(reader, request, sent))
        try:
            await treat(number, answer, writer)
        except ConnectionError:
            pass
        finally:
            forwarding.cancel()
            request.close()
            writer.close()

    listener = await asyncio.start_server(connect, "127.0.0.1", 0)
    relay.url = "http://{}:{}".format(*listener.sockets[0].getsockname())
    try:
        yield relay
    finally:
        listener.close()
