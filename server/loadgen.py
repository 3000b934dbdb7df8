"""Load generator for any server with OpenAI's API: `siluette bench`.

A run asks the server for its model and tokenizer, sends one request of each mode as a probe, warms up, and then sends
the measured requests: each at its arrival time, or as soon as fewer than `concurrency` are in flight. Nothing is
retried; an answer that is an error, or that breaks off, is counted by kind.
"""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from server.loadgen_client import RequestError, Target
from server.loadgen_report import Outcome, Report
from server.loadgen_workload import (
    FIRST_WORD,
    WORDS,
    PlannedRequest,
    Vocabulary,
    Workload,
    plan_requests,
)

T = TypeVar("T")
Endpoint = Literal["completions", "chat"]


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """Settings of a run.

    Attributes:
        target: The server.
        workload: The measured requests.
        model: Name to send; None takes the first one that the server lists.
        endpoint: `completions` or `chat`.
        concurrency: Most requests in flight.
        warmup: Requests before the measured ones.
        p: Of stochastic requests; None leaves it to the server.
        scope: `all` or `decode`, of stochastic and RELU requests; None leaves it to the server.
        temperature: Of all requests.
        ignore_eos: Ask for answers of exactly the planned length; an extension that vLLM, SGLang and Siluette know.
        timeout: Seconds that one request may take.
    """

    target: Target
    workload: Workload
    model: str | None = None
    endpoint: Endpoint = "completions"
    concurrency: int = 16
    warmup: int = 8
    p: float | None = None
    scope: str | None = None
    temperature: float = 1.0
    ignore_eos: bool = True
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, got {self.concurrency}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {self.warmup}")
        modes = self.workload.mode_mix.modes
        if self.p is not None and "stochastic" not in modes:
            raise ValueError(f"p needs stochastic requests, and the mode mix is '{self.workload.mode_mix}'")
        if self.scope is not None and modes == ("silu",):
            raise ValueError(f"scope needs stochastic or relu requests, and the mode mix is '{self.workload.mode_mix}'")

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; no credentials, and an infinite request rate as null."""
        document = asdict(self)
        workload = document.pop("workload")
        target = document.pop("target")
        workload |= {
            "prompt_tokens": str(self.workload.prompt_tokens),
            "output_tokens": str(self.workload.output_tokens),
            "mode_mix": str(self.workload.mode_mix),
            "request_rate": self.workload.request_rate if math.isfinite(self.workload.request_rate) else None,
        }
        scheme = "https" if target["tls"] else "http"
        address = f"{scheme}://{target['host']}:{target['port']}{target['prefix']}"
        return {"base_url": address, **workload, **document}


def run_event_loop(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, on uvloop where it is installed: reading a stream then costs about half."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)


async def run_benchmark(config: BenchConfig, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Send a workload to a server and measure.

    Args:
        config: The settings.
        progress: Takes a line for each long step.

    Raises:
        RequestError: The server cannot be reached, or refuses one request of a mode that was sent as a probe.
    """
    config = replace(config, model=config.model or await _first_model(config.target))
    progress(f"Model {config.model} at {config.target.host}:{config.target.port}")
    vocabulary = await _measure_vocabulary(config)
    measured = plan_requests(config.workload, vocabulary)

    probes = plan_requests(replace(config.workload, num_requests=1, request_rate=math.inf), vocabulary, "probe")
    for mode in config.workload.mode_mix.modes:
        await config.target.stream(*_request(config, replace(probes[0], mode=mode)), config.timeout)
    if config.warmup:
        progress(f"Warming up with {config.warmup} requests")
        workload = replace(config.workload, num_requests=config.warmup, request_rate=math.inf)
        await _send_all(config, plan_requests(workload, vocabulary, "warm-up"), lambda _: None)

    progress(f"Sending {len(measured)} requests, at most {config.concurrency} at a time (seed {config.workload.seed})")
    started = datetime.now(UTC).isoformat(timespec="seconds")
    clock, cpu = time.perf_counter(), time.process_time()
    outcomes = await _send_all(config, measured, progress)
    return Report.of(
        outcomes,
        started=started,
        duration=time.perf_counter() - clock,
        config=config.to_json(),
        client_cpu_seconds=time.process_time() - cpu,
        exact_prompts=vocabulary.exact,
    )


async def _send_all(
    config: BenchConfig, requests: Sequence[PlannedRequest], progress: Callable[[str], None]
) -> list[Outcome]:
    """Send requests on schedule and within the concurrency; outcomes in the order of the requests."""
    slots = asyncio.Semaphore(config.concurrency)
    step = math.ceil(len(requests) / 10)
    finished = 0

    async def send(request: PlannedRequest) -> Outcome:
        nonlocal finished
        try:
            record = await config.target.stream(*_request(config, request), config.timeout)
            return Outcome(request.mode, record)
        except RequestError as error:
            return Outcome(request.mode, error=(error.kind, error.message))
        finally:
            slots.release()
            finished += 1
            if finished % step == 0:
                progress(f"{finished} of {len(requests)} requests")

    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for request in requests:
            await asyncio.sleep(max(0.0, start + request.arrival - time.perf_counter()))
            await slots.acquire()
            tasks.append(group.create_task(send(request)))
    return [task.result() for task in tasks]


def _request(config: BenchConfig, request: PlannedRequest) -> tuple[str, dict[str, Any]]:
    """Path and body of one request. Fields outside OpenAI's API are there only if the settings ask for them."""
    body: dict[str, Any] = {
        "model": config.model,
        "max_tokens": request.max_tokens,
        "temperature": config.temperature,
        "seed": request.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if config.ignore_eos:
        body["ignore_eos"] = True
    if config.workload.mode_mix.modes != ("silu",):
        body["activation"] = _activation(config, request.mode)
    if config.endpoint == "chat":
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": request.prompt}]}
    return "/v1/completions", body | {"prompt": request.prompt}


def _activation(config: BenchConfig, mode: str) -> dict[str, Any]:
    activation: dict[str, Any] = {"mode": mode}
    if mode == "stochastic" and config.p is not None:
        activation["p"] = config.p
    if mode != "silu" and config.scope is not None:
        activation["scope"] = config.scope
    return activation


async def _first_model(target: Target) -> str:
    models = await target.fetch("GET", "/v1/models")
    try:
        return str(models["data"][0]["id"])
    except (TypeError, KeyError, IndexError):
        raise RequestError("malformed", "the server lists no model; name one") from None


async def _measure_vocabulary(config: BenchConfig) -> Vocabulary:
    """Ask the server's tokenizer which words are one token; servers without one give an approximate vocabulary."""
    target, model = config.target, config.model
    alone: dict[str, Any] = {"prompt": FIRST_WORD}
    if config.endpoint == "chat":
        alone = {"messages": [{"role": "user", "content": FIRST_WORD}]}

    async def count(body: dict[str, Any]) -> int:
        return int((await target.fetch("POST", "/tokenize", {"model": model, **body}))["count"])

    try:
        base_tokens, first = await count(alone), await count({"prompt": FIRST_WORD})
        added = {word: await count({"prompt": f"{FIRST_WORD} {word}"}) - first for word in WORDS}
    except (RequestError, TypeError, KeyError, ValueError):
        return Vocabulary()
    return Vocabulary.from_counts(base_tokens, added)
