"""The engine in a thread of its own, behind an asyncio interface."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from uuid import uuid4

from engine.activation import Activation
from engine.config import EngineConfig
from engine.engine import Engine, silent
from engine.errors import EngineOverloaded, EngineStopped, InvalidRequest
from engine.info import EngineStats
from engine.outputs import RequestOutput
from engine.request import Request
from engine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class RequestStream:
    """Output of one request as it comes: an async iterator of pieces, for one consumer on one event loop.

    Pieces that come while the consumer is busy are merged into one, so that a slow consumer costs little and gets
    everything.
    """

    def __init__(
        self, request: Request, loop: asyncio.AbstractEventLoop, abort: Callable[["RequestStream"], None]
    ) -> None:
        self.request_id = request.request_id
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.activation = request.activation
        self.seed = request.seed
        self.loop = loop
        self._abort = abort
        self._pending: RequestOutput | None = None
        self._failure: Exception | None = None
        self._ended = False
        self._news = asyncio.Event()

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> RequestOutput:
        """The next piece.

        Raises:
            EngineStopped: The engine stopped before the request was finished.
        """
        while self._pending is None:
            if self._failure is not None:
                raise self._failure
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        output, self._pending = self._pending, None
        return output

    def abort(self) -> None:
        """Withdraw the request: everything it holds is free within one step. Harmless when it is finished."""
        if not self._ended:
            self._ended = True
            self._news.set()
            self._abort(self)

    def push(self, output: RequestOutput) -> None:
        """Take a piece; on the event loop."""
        if self._ended:
            return
        if self._pending is None:
            self._pending = output
        else:
            self._pending.extend(output)
        self._ended = output.finished
        self._news.set()

    def fail(self, failure: Exception) -> None:
        """End with an error; on the event loop."""
        if not self._ended:
            self._failure, self._ended = failure, True
            self._news.set()


class AsyncEngine:
    """Runs an `Engine` in a thread; requests come from an event loop and their output goes back there.

    Args:
        config: What to load and how to run it.
        progress: Called with a line of text before each long step.

    Raises:
        ModelLoadError: The model or adapter cannot be loaded.
        InvalidConfig: The configuration does not fit the model.
    """

    def __init__(self, config: EngineConfig, progress: Callable[[str], None] = silent) -> None:
        self.config = config
        # Written by callers, emptied by the engine thread at the start of each step.
        self._arrivals: deque[Request] = deque()
        self._withdrawals: deque[RequestStream] = deque()
        self._streams: dict[str, RequestStream] = {}
        self._wake = threading.Condition()
        self._started = self._stopping = False
        self._failure: Exception | None = None
        # The model is loaded by the thread that will run it. Each thread that calls PyTorch gets compute threads of its
        # own, and once there are more of them than cores, OpenMP sends them to sleep at each turn: half the speed.
        loaded: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._run, args=(progress, loaded), name="siluette-engine", daemon=True)
        self._thread.start()
        self._engine = loaded.result()
        self.info = self._engine.info
        self.tokenizer = self._engine.tokenizer

    def start(self) -> None:
        """Take requests from now on. Idempotent."""
        with self._wake:
            self._started = True

    @property
    def alive(self) -> bool:
        """Whether the engine thread runs and takes requests."""
        return self._started and self._thread.is_alive() and not self._stopping

    def submit(
        self,
        prompt_token_ids: SequenceOf[int],
        sampling: SamplingParams | None = None,
        activation: Activation | None = None,
        *,
        request_id: str | None = None,
    ) -> RequestStream:
        """Check and queue a request. Does not wait; call it on the event loop that will read the stream.

        Raises:
            InvalidRequest: The request cannot succeed; also `ContextLengthExceeded` and `UntunedActivation`.
            EngineOverloaded: Too many sequences wait already.
            EngineStopped: The engine does not run.
        """
        sampling = sampling or SamplingParams()
        if not self.alive:
            raise EngineStopped("the engine has stopped" if self._failure is None else "the engine has failed")
        request = self._engine.check(request_id or uuid4().hex, prompt_token_ids, sampling, activation or Activation())
        if request.request_id in self._streams:
            raise InvalidRequest(f"a request with the id {request.request_id!r} is already in flight", "request_id")
        if sampling.n > self.config.max_waiting:
            raise InvalidRequest(f"n is {sampling.n}; at most {self.config.max_waiting} sequences may wait", "n")
        waiting = self._engine.num_waiting + sum(arrival.sampling.n for arrival in tuple(self._arrivals))
        if waiting + sampling.n > self.config.max_waiting:
            raise EngineOverloaded(
                f"{waiting} sequences wait already; at most {self.config.max_waiting} may", retry_after=1.0
            )
        stream = RequestStream(request, asyncio.get_running_loop(), self._withdraw)
        with self._wake:
            if self._stopping:  # since the look above; nobody would ever end this stream
                raise EngineStopped("the engine has stopped")
            self._streams[request.request_id] = stream
            self._arrivals.append(request)
            self._wake.notify()
        return stream

    async def generate(
        self,
        prompt: str | SequenceOf[int],
        sampling: SamplingParams | None = None,
        activation: Activation | None = None,
        *,
        request_id: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Generate text: `async for output in engine.generate(...)`. Leaving the loop early aborts the request.

        Args:
            prompt: Text, or token ids.
            sampling: How tokens are drawn.
            activation: How feed-forward layers are activated.
            request_id: Unique among requests in flight; made up if None.

        Yields:
            What is new.

        Raises:
            InvalidRequest, EngineOverloaded, EngineStopped: As `submit`.
        """
        token_ids = await asyncio.to_thread(self.tokenizer.encode, prompt) if isinstance(prompt, str) else prompt
        stream = self.submit(token_ids, sampling, activation, request_id=request_id)
        try:
            async for output in stream:
                yield output
        finally:
            stream.abort()

    def stats(self) -> EngineStats:
        """Snapshot of all counters; any thread may call it."""
        return self._engine.stats()

    def shutdown(self) -> None:
        """Abort what is in flight and stop the thread. Idempotent."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _withdraw(self, stream: RequestStream) -> None:
        with self._wake:
            self._withdrawals.append(stream)
            self._wake.notify()

    def _run(self, progress: Callable[[str], None], loaded: Future[Engine]) -> None:
        """The engine thread: load the model, then take what came in, compute a step, hand out what is new."""
        try:
            engine = Engine(self.config, progress)
            if self.config.pin_threads:
                engine.pin_threads()
        except BaseException as failure:
            loaded.set_exception(failure)
            return
        loaded.set_result(engine)
        try:
            while self._wait_for_work(engine):
                self._take_messages(engine)
                self._hand_out(engine.step())
        except Exception as failure:
            logger.exception("The engine failed")
            self._failure = failure
        with self._wake:
            self._stopping = True
            streams = list(self._streams.values())
            self._streams.clear()
        for stream in streams:
            _call(stream.loop, stream.fail, EngineStopped("the engine stopped before the request was finished"))
        for stream in streams:
            engine.abort(stream.request_id)

    def _wait_for_work(self, engine: Engine) -> bool:
        """Sleep until there is something to do; False to stop."""
        with self._wake:
            while not (self._stopping or self._arrivals or self._withdrawals or engine.has_work):
                self._wake.wait()
            return not self._stopping

    def _take_messages(self, engine: Engine) -> None:
        while self._arrivals:
            engine.add(self._arrivals.popleft())
        while self._withdrawals:  # after arrivals: a request may be withdrawn before it was ever seen
            stream = self._withdrawals.popleft()
            if self._streams.get(stream.request_id) is stream:  # and not a later one with the same id
                del self._streams[stream.request_id]
                engine.abort(stream.request_id)

    def _hand_out(self, outputs: list[RequestOutput]) -> None:
        """Wake each event loop once for all its streams."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, RequestOutput]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                by_loop.setdefault(stream.loop, []).append((stream, output))
                if output.finished:
                    del self._streams[output.request_id]
        for loop, deliveries in by_loop.items():
            _call(loop, _push_all, deliveries)


def _push_all(deliveries: list[tuple[RequestStream, RequestOutput]]) -> None:
    for stream, output in deliveries:
        stream.push(output)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], argument: object) -> None:
    """Run a function on an event loop, which may be closed by now: then nobody is left to listen."""
    try:
        loop.call_soon_threadsafe(function, argument)
    except RuntimeError:
        logger.debug("An event loop closed before its requests were finished")
