"""The life of one HTTP request's prompts in the engine: submitted, read piece by piece, ended or aborted."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import uuid4

from engine import Activation, EngineStopped, InvalidRequest, RequestOutput, RequestStream, SamplingParams
from server.responses import ActivationUsed, AnswerEnd, AnswerHead, Usage, activation_used
from server.services import Services

if TYPE_CHECKING:
    from server.tracing import RequestTrace  # needs an extra


class Generation:
    """All prompts of one request. Every prompt runs with the same seeds, so one seed reproduces the whole answer.

    Attributes:
        id: Id of the answer.
        created: Unix time of the submission.
        n: Samples for each prompt.
        aborted: Whether the client left.
    """

    def __init__(
        self,
        services: Services,
        request_id: str,
        streams: Sequence[RequestStream],
        n: int,
        trace: "RequestTrace | None" = None,
    ) -> None:
        self.id = request_id
        self.created = int(time.time())
        self.n = n
        self.aborted = False
        self._services = services
        self._streams = streams
        self._trace = trace
        self._observers = [
            services.metrics.observe_prompt(stream.activation.mode, stream.num_prompt_tokens) for stream in streams
        ]
        self._completion_tokens = 0
        self._cached_tokens: dict[int, int] = {}  # by prompt, of its first sample

    @classmethod
    def submit(
        cls,
        services: Services,
        id_prefix: str,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        activation: Activation,
        headers: Mapping[str, str],
    ) -> "Generation":
        """Hand the prompts to the engine, all or none.

        Args:
            services: Of the application.
            id_prefix: What the answer's id begins with.
            prompts: Token ids of each.
            sampling: Of all of them.
            activation: Of all of them.
            headers: Of the HTTP request; they may name the trace that it belongs to.

        Raises:
            InvalidRequest: A prompt or a parameter can never work, or there are too many prompts and samples.
            EngineOverloaded: There is no room in the queue.
            EngineStopped: The server is shutting down or the engine is dead.
        """
        request_id = f"{id_prefix}-{uuid4().hex}"
        if services.tracer is None:
            return cls(services, request_id, _submit(services, request_id, prompts, sampling, activation), sampling.n)
        trace = services.tracer.begin(id_prefix, services.model_name, sampling, activation, headers)
        try:
            streams = _submit(services, request_id, prompts, sampling, activation)
        except BaseException as error:
            trace.refused(error)
            raise
        return cls(services, request_id, streams, sampling.n, trace)

    @property
    def seed(self) -> int:
        """The sampling seed that was used."""
        return self._streams[0].seed

    @property
    def activation(self) -> ActivationUsed:
        """The activation that was used."""
        return activation_used(self._streams[0].activation)

    def head(self, kind: str) -> AnswerHead:
        """The beginning of the answer, whose `object` is `kind`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self._services.model_name,
            "system_fingerprint": self._services.fingerprint,
        }

    @property
    def end(self) -> AnswerEnd:
        """The end of the answer."""
        return {"usage": self.usage, "activation": self.activation, "seed": self.seed}

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        prompt_tokens = sum(stream.num_prompt_tokens for stream in self._streams)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens.values())},
        }

    def abort(self) -> None:
        """The client left: stop and free everything."""
        self.aborted = True
        for stream in self._streams:
            stream.abort()

    async def pieces(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """New tokens as they come, each piece with the number of its prompt. To be read once, and closed.

        Raises:
            EngineStopped: The engine died.
        """
        unfinished = dict(enumerate(self._observers))
        failure: Exception | None = None
        self._services.lifecycle.begin()
        try:
            async with aclosing(_merge(self._streams)) as pieces:
                async for number, piece in pieces:
                    self._completion_tokens += sum(len(sample.token_ids) for sample in piece.samples)
                    self._cached_tokens.setdefault(number, piece.num_cached_tokens)
                    self._observers[number].piece(piece)
                    if piece.finished and not self.aborted:
                        unfinished.pop(number).finished()
                    yield number, piece
        except Exception as error:
            failure = error
            raise
        finally:
            for number, observer in unfinished.items():
                self._streams[number].abort()
                if failure is not None:
                    observer.failed()
                else:
                    observer.aborted()
            if self._trace is not None:
                self._end_trace(self._trace, failure)
            self._services.lifecycle.end()

    def _end_trace(self, trace: "RequestTrace", failure: Exception | None) -> None:
        from server.tracing import AnswerFacts  # needs an extra, which is there if there is a trace

        usage = self.usage
        facts = AnswerFacts(
            id=self.id,
            seed=self.seed,
            activation=self._streams[0].activation,
            input_tokens=usage["prompt_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            output_tokens=usage["completion_tokens"],
        )
        trace.ended(facts, [observer.times for observer in self._observers], failure)

    async def collect(self) -> list[RequestOutput]:
        """Wait for the end; one whole output for each prompt (fewer if the client left).

        Raises:
            EngineStopped: The engine died.
        """
        outputs: dict[int, RequestOutput] = {}
        async with aclosing(self.pieces()) as pieces:
            async for number, piece in pieces:
                if number in outputs:
                    outputs[number].extend(piece)
                else:
                    outputs[number] = piece
        return [outputs[number] for number in sorted(outputs)]


def _submit(
    services: Services,
    request_id: str,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    activation: Activation,
) -> list[RequestStream]:
    """A stream for each prompt; see `Generation.submit`."""
    if services.lifecycle.draining:
        raise EngineStopped("the server is shutting down and takes no new requests")
    most = services.engine.config.max_waiting
    if len(prompts) * sampling.n > most:
        raise InvalidRequest(f"{len(prompts)} prompts times n = {sampling.n} is more than {most} sequences", "n")
    streams: list[RequestStream] = []
    try:
        for number, token_ids in enumerate(prompts):
            stream = services.engine.submit(token_ids, sampling, activation, request_id=f"{request_id}-{number}")
            streams.append(stream)
            sampling, activation = replace(sampling, seed=stream.seed), stream.activation
    except BaseException:
        for stream in streams:
            stream.abort()
        raise
    return streams


async def _merge(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Pieces of several streams in the order of their arrival."""
    if len(streams) == 1:  # nearly always; no task and no queue then
        async for piece in streams[0]:
            yield 0, piece
        return
    # The queue is short, so that pieces pile up, and are merged, in the streams when the client is slow.
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue(maxsize=len(streams))
    readers = [asyncio.create_task(_forward(number, stream, queue)) for number, stream in enumerate(streams)]
    running = len(readers)
    try:
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for reader in readers:
            reader.cancel()


async def _forward(
    number: int, stream: RequestStream, queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None]
) -> None:
    try:
        async for piece in stream:
            await queue.put((number, piece))
        await queue.put(None)
    except Exception as error:  # the reader of the queue raises it
        await queue.put(error)
