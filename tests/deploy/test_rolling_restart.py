"""Two servers behind nginx are replaced one after the other under load, and no request notices.

nginx runs `deploy/nginx/siluette.conf` with nothing but addresses and ports changed.
"""

import asyncio
import re
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI

from bench.peers_server import free_port
from tests.debian_programs import find_program
from tests.e2e.conftest import ServerProcess, start_server

pytestmark = pytest.mark.slow

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "nginx" / "siluette.conf"
TOKENS = 24
MODES = [{"mode": "silu"}, {"mode": "stochastic", "p": 0.8, "seed": 5}, {"mode": "relu"}]
PATIENCE = 300.0  # seconds for anything to happen on a slow machine

MAIN = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/siluette.conf;
}}
"""


def configuration(port: int, servers: list[int]) -> str:
    """The project's configuration with a test's ports."""
    text = CONFIGURATION.read_text()
    for old, new in {
        "listen 80;": f"listen 127.0.0.1:{port};",
        "127.0.0.1:8001": f"127.0.0.1:{servers[0]}",
        "127.0.0.1:8002": f"127.0.0.1:{servers[1]}",
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


@dataclass
class Site:
    """nginx and the two servers behind it."""

    url: str
    folder: Path
    servers: list[ServerProcess]

    def replace(self, index: int) -> ServerProcess:
        """Start a successor of a server that has ended, at the same address."""
        port = self.servers[index].url.rsplit(":", 1)[1]
        log = self.folder / f"successor-{index}.txt"
        self.servers[index] = start_server(log, "--port", port, "--allow-untuned-activations")
        return self.servers[index]


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    program = find_program("nginx", "nginx", request.config.cache)
    ports = [free_port(), free_port()]
    options = ("--allow-untuned-activations", "--shutdown-timeout", str(PATIENCE))
    port = free_port()
    (folder / "siluette.conf").write_text(configuration(port, ports))
    main = folder / "nginx.conf"
    main.write_text(MAIN.format(folder=folder))
    arguments = [program, "-p", folder, "-e", folder / "error.log", "-c", main]
    site = Site(f"http://127.0.0.1:{port}", folder, [])
    try:
        for number, server_port in enumerate(ports):
            log = folder / f"server-{number}.txt"
            site.servers.append(start_server(log, "--port", str(server_port), *options))
        nginx = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)
        try:
            wait_until_served(site, nginx)
            yield site
        finally:
            nginx.terminate()
            nginx.wait()
    finally:
        for server in site.servers:
            server.process.terminate()
            server.process.wait()


def wait_until_served(site: Site, nginx: subprocess.Popen[bytes]) -> None:
    while nginx.poll() is None:
        try:
            if httpx.get(f"{site.url}/health/ready").status_code == 200:
                return
        except httpx.ConnectError:
            time.sleep(0.05)
    pytest.fail(f"nginx ended with status {nginx.returncode}:\n{(site.folder / 'error.log').read_text()}")


@dataclass
class Load:
    """Clients that send one request after the other, and what became of these.

    Attributes:
        finished: Requests with a complete answer.
        failures: What went wrong with the others.
    """

    client: AsyncOpenAI
    finished: int = 0
    failures: list[str] = field(default_factory=list)
    stopped: bool = False

    async def run(self, number: int) -> None:
        """One client; every second one streams."""
        request = 0
        while not self.stopped:
            request += 1
            try:
                tokens = await (self._stream if number % 2 else self._plain)(f"{number}.{request}. Once", request)
                if tokens != TOKENS:
                    self.failures.append(f"client {number}: an answer of {tokens} tokens")
                self.finished += 1
            except Exception as error:
                self.failures.append(f"client {number}: {error!r}")

    async def _plain(self, prompt: str, number: int) -> int:
        body = {"ignore_eos": True, "activation": MODES[number % len(MODES)]}
        answer = await self.client.completions.create(
            model="SmolLM2-135M-Instruct", prompt=prompt, max_tokens=TOKENS, extra_body=body
        )
        return answer.usage.completion_tokens if answer.usage else 0

    async def _stream(self, prompt: str, number: int) -> int:
        body = {"ignore_eos": True, "activation": MODES[number % len(MODES)]}
        usage = None
        events = await self.client.completions.create(
            model="SmolLM2-135M-Instruct",
            prompt=prompt,
            max_tokens=TOKENS,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=body,
        )
        async for event in events:
            usage = event.usage or usage
        return usage.completion_tokens if usage else 0


@asynccontextmanager
async def load_on(url: str, clients: int) -> AsyncIterator[Load]:
    # No retries: a request that only a second try could save has failed.
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE) as client:
        load = Load(client)
        async with asyncio.TaskGroup() as tasks:
            for number in range(clients):
                tasks.create_task(load.run(number))
            yield load
            load.stopped = True


async def until_busy(server: ServerProcess) -> None:
    """Wait until a server has begun some requests and has room for no idle moment."""
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http:
        async with asyncio.timeout(PATIENCE):
            while (await http.get("/health")).json()["running"] < 2:
                await asyncio.sleep(0.01)


async def long_stream(url: str, started: asyncio.Event) -> str:
    """The last event of a stream that a server is not done with for a while."""
    request = {"prompt": "Once", "max_tokens": 200, "ignore_eos": True, "stream": True}
    lines: list[str] = []
    client = httpx.AsyncClient(base_url=url, timeout=PATIENCE)
    async with client as http, http.stream("POST", "/v1/completions", json=request) as response:
        async for line in response.aiter_lines():
            started.set()
            lines += [line] if line else []
    return lines[-1]


async def refusals(server: ServerProcess) -> int:
    """How many requests a server refuses until it is gone."""
    counted = 0
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as http:
        while True:
            try:
                metrics = (await http.get("/metrics")).text
            except httpx.TransportError:
                return counted
            found = re.findall(r'^siluette_http_requests_total{.*status="503".*} ([\d.e+]+)$', metrics, re.MULTILINE)
            counted = int(sum(map(float, found)))
            await asyncio.sleep(0.05)


async def test_no_request_fails_while_both_servers_are_replaced(site: Site) -> None:
    async with load_on(site.url, clients=8) as load:
        for index in range(2):
            leaving = site.servers[index]
            await until_busy(leaving)
            before = load.finished
            started = asyncio.Event()
            stream = asyncio.create_task(long_stream(leaving.url, started))  # it drains for as long as this takes
            await started.wait()
            stopped = asyncio.create_task(asyncio.to_thread(leaving.stop))
            assert await refusals(leaving) > 0  # each of them was served by the other one, for none has failed
            assert await stopped == 0
            assert await stream == "data: [DONE]"
            # It is down now, and the other one serves alone.
            successor = await asyncio.to_thread(site.replace, index)
            assert load.finished > before
            await until_busy(successor)

    print(f"{load.finished} requests finished, {len(load.failures)} failed")
    assert load.failures == []
    aborted = [server.log.read_text() for server in site.servers if "aborting" in server.log.read_text()]
    assert aborted == []


async def test_operators_pages_are_not_public(site: Site) -> None:
    async with httpx.AsyncClient(base_url=site.url, timeout=PATIENCE) as http:
        assert (await http.get("/health/ready")).status_code == 200
        assert (await http.get("/version")).status_code == 200
        for path in ("/metrics", "/health", "/health/live"):
            assert (await http.get(path)).status_code == 404
