"""One round of one peer: a server that is started and loaded, or a program that measures itself."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.peers_catalogue import Peer, Site
from bench.peers_server import MIB, MemoryWatch, RunningServer, free_port, resident_memory, running_server
from bench.peers_setup import PeerError, run
from server.loadgen import BenchConfig, run_benchmark
from server.loadgen_client import RequestError
from server.loadgen_report import MS, Report
from server.loadgen_workload import Length, ModeMix, Workload

WARM_UP_TOKENS = 16
FIRST_TOKEN_OUTPUT = 2  # of answers of which only the first token counts
OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What every peer is asked for.

    Attributes:
        streams: Numbers of requests in flight.
        requests: Requests of a load, or as many as it has streams if that is more.
        prompt_tokens: Of the loads.
        output_tokens: Of the loads.
        long_prompt: Tokens of the prompts whose first token is timed.
        memory_streams: Requests in flight while memory is weighed.
        memory_tokens: Tokens of each of these sequences, a quarter of them output.
        threads: Compute threads.
        start_timeout: Seconds from a server's start to its first answer.
        request_timeout: Seconds that one answer may take.
    """

    streams: tuple[int, ...]
    requests: int
    prompt_tokens: int
    output_tokens: int
    long_prompt: int
    memory_streams: int
    memory_tokens: int
    threads: int
    start_timeout: float
    request_timeout: float


@dataclass(frozen=True, slots=True)
class Load:
    """One load.

    Attributes:
        requests: Complete answers.
        failed: Answers that were not.
        tokens_per_second: Output tokens over the whole time, prompts included.
        decode_tokens_per_second: The same without the time to the first token. Of a server, known for one stream only:
            answers of several may wait for each other.
    """

    streams: int
    requests: int
    output_tokens: int
    tokens_per_second: float
    decode_tokens_per_second: float | None
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Session:
    """All figures of one round. A program without a server has no start and no memory under load.

    Attributes:
        memory_mib: Resident, after a load of many long sequences on a server that has seen no other.
        peak_memory_mib: The most that was seen during it; of a program, during the whole round.
        build: What the program says about how it was compiled.
        complaints: The first message of each kind of failed request.
    """

    loads: tuple[Load, ...]
    ttft_ms: float | None
    seconds_to_ready: float | None = None
    memory_mib: float | None = None
    peak_memory_mib: float | None = None
    build: str | None = None
    complaints: tuple[str, ...] = ()


async def run_session(peer: Peer, site: Site, settings: Settings, number: int) -> Session:
    """One round.

    Args:
        peer: The peer.
        site: Its environment and weights; the port is chosen here.
        settings: The loads.
        number: Of the round: each has prompts of its own, the same for all peers.

    Raises:
        PeerError: It did not start, ended, or answered nothing.
    """
    if peer.ready is None:
        return run_program(peer, site, settings, number)
    site = replace(site, port=free_port())
    variables = {**OFFLINE, **peer.variables(site)}
    folders = (site.folder, site.models.hugging_face.parent)
    async with running_server(
        peer.command(site), variables, site.port, peer.ready, settings.start_timeout, folders
    ) as server:
        model = None if peer.pinned_model is None else peer.pinned_model(site)
        return await _Loader(server, peer, model, settings, number).measure()


class _Loader:
    """Sends the loads of one round."""

    def __init__(self, server: RunningServer, peer: Peer, model: str | None, settings: Settings, number: int) -> None:
        self._server, self._peer, self._model, self._settings = server, peer, model, settings
        self._seeds = random.Random(number)  # no prompt comes twice, so that no prefix cache helps
        self._complaints: dict[str, str] = {}

    async def measure(self) -> Session:
        settings, pid = self._settings, self._server.pid
        # First of all: caches of prefixes hold what other loads sent for as long as there is room.
        output = max(1, settings.memory_tokens // 4)
        async with MemoryWatch(pid) as watch:
            await self._send(settings.memory_streams, settings.memory_streams, settings.memory_tokens - output, output)
        after = resident_memory(pid)
        await self._send(max(settings.streams), max(settings.streams), settings.prompt_tokens, WARM_UP_TOKENS)
        first = await self._send(1, settings.requests, settings.long_prompt, FIRST_TOKEN_OUTPUT)
        loads = []
        for streams in settings.streams:
            requests = max(streams, settings.requests)
            report = await self._send(streams, requests, settings.prompt_tokens, settings.output_tokens)
            loads.append(load_of(report, streams))
        return Session(
            loads=tuple(loads),
            ttft_ms=None if first.total.ttft is None else first.total.ttft.p50,
            seconds_to_ready=self._server.seconds_to_ready,
            memory_mib=None if after is None else after / MIB,
            peak_memory_mib=None if watch.peak is None else max(watch.peak, after or 0) / MIB,
            complaints=tuple(self._complaints.values()),
        )

    async def _send(self, streams: int, requests: int, prompt_tokens: int, output_tokens: int) -> Report:
        workload = Workload(
            num_requests=requests,
            prompt_tokens=Length(prompt_tokens),
            output_tokens=Length(output_tokens),
            mode_mix=ModeMix.parse(self._peer.mode),
            seed=self._seeds.getrandbits(31),
        )
        config = BenchConfig(
            self._server.target,
            workload,
            model=self._model,
            concurrency=streams,
            warmup=0,  # `run_benchmark` sends one request before it measures
            temperature=0.0,
            ignore_eos=self._peer.ignore_eos,
            timeout=self._settings.request_timeout,
        )
        try:
            report = await run_benchmark(config)
        except RequestError as error:
            raise PeerError(f"a request failed: {error.kind}: {error.message}") from error
        for failure in report.errors:
            message = f"{failure.count} of {requests} requests at {streams} streams: {failure.kind}: {failure.example}"
            self._complaints.setdefault(failure.kind, message)
        if not report.total.completed:
            raise PeerError("; ".join(self._complaints.values()))
        return report


def load_of(report: Report, streams: int) -> Load:
    """The figures that count of a load generator's report."""
    total = report.total
    return Load(
        streams=streams,
        requests=total.completed,
        output_tokens=total.output_tokens,
        tokens_per_second=report.throughput["output_tokens_per_second"],
        decode_tokens_per_second=MS / total.tpot.mean if streams == 1 and total.tpot is not None else None,
        failed=total.failed,
    )


def run_program(peer: Peer, site: Site, settings: Settings, number: int) -> Session:
    """One round of a program that has no server and prints its figures: `bench.peers_llama`, `bench.peers_generate`.

    Raises:
        PeerError: It failed.
    """
    command = peer.command(site)
    if peer.streams is None:
        command += ["--streams", *map(str, settings.streams)]
    for name in ("threads", "requests", "prompt_tokens", "output_tokens", "long_prompt"):
        command += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    command += ["--seed", str(number)]
    folders = (site.folder, site.models.hugging_face.parent)
    return parse_program(run(command, peer.title, {**OFFLINE, **peer.variables(site)}, folders))


def parse_program(output: str) -> Session:
    """Read what such a program printed: its last line is a JSON object with the fields of `Session`.

    Raises:
        PeerError: It is none.
    """
    lines: Sequence[str] = output.strip().splitlines() or [""]
    try:
        document: dict[str, Any] = json.loads(lines[-1])
        loads = tuple(Load(**load) for load in document.pop("loads"))
        return Session(loads=loads, **document)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PeerError(f"its last line is no result: {lines[-1][:200]!r}") from error
