"""What observing costs when nothing else runs: recorded answers go through the server's own counting again and again.

A difference of two throughputs drowns in a machine's noise long before it is as small as one per cent. Processor time
of the counting alone does not: it is set against what a token costs in all.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import cast

from prometheus_client import generate_latest

from engine import Activation, AsyncEngine, RequestOutput, RequestStream, SamplingParams
from server.generation import Generation
from server.metrics import ServerMetrics
from server.services import Services


@dataclass(frozen=True, slots=True)
class Recording:
    """One request's pieces as the engine gave them: a `RequestStream` that can be read more than once."""

    num_prompt_tokens: int
    activation: Activation
    seed: int
    pieces: tuple[RequestOutput, ...]

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        for piece in self.pieces:
            yield piece

    def abort(self) -> None:
        """There is nothing to withdraw."""


@dataclass(frozen=True, slots=True)
class Replay:
    """Recordings that went through a server's counting. `cpu_seconds` is of this process, exported traces included."""

    requests: int
    tokens: int
    cpu_seconds: float


async def record(engine: AsyncEngine, prompts: Sequence[str], sampling: SamplingParams) -> list[Recording]:
    """Run all prompts at once and keep what they give, piece by piece."""

    async def read(stream: RequestStream) -> Recording:
        pieces = tuple([piece async for piece in stream])
        return Recording(stream.num_prompt_tokens, stream.activation, stream.seed, pieces)

    return await asyncio.gather(*[read(engine.submit(engine.tokenizer.encode(prompt), sampling)) for prompt in prompts])


async def replay(services: Services, recordings: Sequence[Recording], sampling: SamplingParams, repeats: int) -> Replay:
    """Let recordings go through what counts and traces. The services' tracer is shut down, so that all is sent."""
    requests = tokens = 0
    begin = time.process_time()
    for _ in range(repeats):
        for recording in recordings:
            trace = None
            if services.tracer is not None:
                trace = services.tracer.begin("cmpl", services.model_name, sampling, recording.activation, {})
            generation = Generation(services, "cmpl", [cast(RequestStream, recording)], 1, trace)
            async for _, piece in generation.pieces():
                tokens += sum(len(sample.token_ids) for sample in piece.samples)
            requests += 1
    if services.tracer is not None:
        services.tracer.shutdown()
    return Replay(requests, tokens, time.process_time() - begin)


def scrape_ms(metrics: ServerMetrics, repeats: int = 50) -> float:
    """Milliseconds of processor time that one scrape takes."""
    begin = time.process_time()
    for _ in range(repeats):
        generate_latest(metrics.registry)
    return 1e3 * (time.process_time() - begin) / repeats
