"""The engine for scripts and notebooks: call it, get text."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any, cast

from engine.activation import Activation
from engine.config import EngineConfig
from engine.engine import Engine, silent
from engine.errors import EngineStopped, InvalidRequest
from engine.info import EngineStats
from engine.outputs import PromptScore, RequestOutput
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.threads import use_threads

Prompt = str | SequenceOf[int]


class LLM:
    """A model that runs in the calling thread.

    Example:
        >>> llm = LLM()
        >>> outputs = llm.generate(["Once"], SamplingParams(max_tokens=20), Activation("stochastic", p=0.8, seed=1))
        >>> outputs[0].samples[0].text

    Args:
        model: Hugging Face folder or name, or GGUF file; None is the default model.
        config: Everything else; its `model` is used if `model` is None.
        progress: Called with a line of text before each long step.

    Raises:
        ModelLoadError: The model or adapter cannot be loaded.
        InvalidConfig: The configuration does not fit the model.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: EngineConfig | None = None,
        progress: Callable[[str], None] = silent,
    ) -> None:
        config = config or EngineConfig()
        self._engine: Engine | None = Engine(replace(config, model=model or config.model), progress)
        self.config = self._engine.config
        self.info = self._engine.info
        self.tokenizer = self._engine.tokenizer
        self._counter = 0
        self._unread: dict[str, deque[RequestOutput]] = {}  # of each request in flight, its caller's queue

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling: SamplingParams | None = None,
        activation: Activation | None = None,
    ) -> list[RequestOutput]:
        """Complete one or several prompts, batched.

        Args:
            prompts: A text, a list of token ids, or a list of these.
            sampling: How tokens are drawn; the same for all prompts.
            activation: How feed-forward layers are activated; the same for all prompts.

        Returns:
            One output per prompt, in order.

        Raises:
            InvalidRequest: A prompt or parameter is refused; nothing was generated.
        """
        requests = self._check(_as_batch(prompts), sampling, activation)
        outputs: dict[str, RequestOutput] = {}
        for piece in self._run(requests):
            if piece.request_id in outputs:
                outputs[piece.request_id].extend(piece)
            else:
                outputs[piece.request_id] = piece
        for output in outputs.values():
            output.samples.sort(key=lambda sample: sample.index)
        return [outputs[request.request_id] for request in requests]

    def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, activation: Activation | None = None
    ) -> Iterator[RequestOutput]:
        """Complete one prompt, piece by piece. Leaving the loop early aborts it.

        Several streams may be read in turns; they are computed together.

        Raises:
            InvalidRequest: The prompt or a parameter is refused.
        """
        return self._run(self._check([prompt], sampling, activation))

    def chat(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        sampling: SamplingParams | None = None,
        activation: Activation | None = None,
    ) -> RequestOutput:
        """Answer a conversation of `{"role": ..., "content": ...}` messages.

        Raises:
            InvalidRequest: The model has no chat template, or the template refuses the messages.
        """
        return self.generate(self.tokenizer.encode_chat(messages), sampling, activation)[0]

    def score(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        activation: Activation | SequenceOf[Activation] | None = None,
    ) -> list[PromptScore]:
        """Log-probabilities of the tokens of one or several prompts, batched. Generates nothing.

        Nothing is read from the prefix cache, which knows no logits; what is computed goes into it.

        Args:
            prompts: A text, a list of token ids, or a list of these; a prompt may fill the whole context.
            activation: How feed-forward layers are activated: one for all prompts or one for each, of scope `all`.

        Returns:
            One score per prompt, in order.

        Raises:
            InvalidRequest: A prompt or activation is refused; nothing was computed.
        """
        engine, batch = self._open(), _as_batch(prompts)
        each = [activation or Activation()] * len(batch) if not isinstance(activation, SequenceOf) else activation
        if len(each) != len(batch):
            raise InvalidRequest(
                f"activation must be one for all or one for each of the {len(batch)} prompts, got {len(each)}",
                "activation",
            )
        requests = [
            engine.check_score(self._next_id(), self._token_ids(prompt), one)
            for prompt, one in zip(batch, each, strict=True)
        ]
        outputs = {output.request_id: output for output in self._run(requests)}
        return [
            PromptScore(request.prompt_token_ids, outputs[request.request_id].prompt_logprobs or (), request.activation)
            for request in requests
        ]

    def stats(self) -> EngineStats:
        """Snapshot of all counters."""
        return self._open().stats()

    def close(self) -> None:
        """Release the model's memory. Streams that are not read to their end raise `EngineStopped`. Idempotent."""
        self._engine = None

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> Engine:
        if self._engine is None:
            raise EngineStopped("this LLM is closed")
        return self._engine

    def _check(
        self, prompts: SequenceOf[Prompt], sampling: SamplingParams | None, activation: Activation | None
    ) -> list[Request]:
        engine = self._open()
        sampling, activation = sampling or SamplingParams(), activation or Activation()
        return [engine.check(self._next_id(), self._token_ids(prompt), sampling, activation) for prompt in prompts]

    def _next_id(self) -> str:
        self._counter += 1
        return str(self._counter)

    def _token_ids(self, prompt: Prompt) -> SequenceOf[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _run(self, requests: list[Request]) -> Iterator[RequestOutput]:
        """Queue requests when the first piece is wanted, and hand out their pieces until they are finished."""
        use_threads(self.config.threads)
        unread: deque[RequestOutput] = deque()
        unfinished = {request.request_id for request in requests}
        try:
            for request in requests:
                self._unread[request.request_id] = unread
                self._open().add(request)
            while unfinished:
                while not unread:
                    self._step()
                output = unread.popleft()
                if output.finished:
                    unfinished.remove(output.request_id)
                yield output
        finally:
            for request in requests:
                self._unread.pop(request.request_id, None)
                if self._engine is not None:
                    self._engine.abort(request.request_id)

    def _step(self) -> None:
        """Compute one step of everything in flight. A step moves other streams too: their pieces wait for them."""
        for output in self._open().step():
            self._unread[output.request_id].append(output)


def _as_batch(prompts: Prompt | SequenceOf[Prompt]) -> SequenceOf[Prompt]:
    alone = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [cast(Prompt, prompts)] if alone else cast(SequenceOf[Prompt], prompts)
