"""From an answer's bytes to its type: pure, and shared by both clients."""

from typing import TypeVar

from pydantic import Field, ValidationError

from siluette_client.activation import Activation
from siluette_client.errors import InvalidAnswer, SiluetteError, StreamInterrupted, error_of_event
from siluette_client.sse import SSEDecoder
from siluette_client.types import Answer, Choice, Chunk, Completion, Model, ModelList, TokenLogprob, Usage

DONE = "[DONE]"

AnswerT = TypeVar("AnswerT", bound=Answer)


def parse_completion(content: bytes) -> Completion:
    """The answer of either completion endpoint.

    Raises:
        InvalidAnswer: It is something else.
    """
    return _parse(Completion, content)


def parse_models(content: bytes) -> list[Model]:
    """The answer of `/v1/models`.

    Raises:
        InvalidAnswer: It is something else.
    """
    return _parse(ModelList, content).data


class StreamEvent(Answer):
    """The data of one event."""

    id: str | None = None
    model: str | None = None
    created: int | None = None
    system_fingerprint: str | None = None
    choices: list[Chunk] = Field(default_factory=list)
    usage: Usage | None = None
    activation: Activation | None = None
    seed: int | None = None
    error: object = None


class StreamReader:
    """Puts a streamed answer together out of bytes that arrive in any pieces.

    An error is kept in `failure` instead of raised, so that the pieces which came before it in the same bytes are not
    lost: however the bytes are cut, a reader sees the same pieces and then the same error.

    Attributes:
        done: Whether the end has come: the event `[DONE]`.
        failure: Why the stream is over before that: an error event, or data that is not the API's.
    """

    def __init__(self) -> None:
        self.done = False
        self.failure: SiluetteError | None = None
        self._decoder = SSEDecoder()
        self._head: dict[str, object] = {}
        self._choices: dict[int, _GrowingChoice] = {}

    def feed(self, data: bytes) -> list[Chunk]:
        """The pieces of text that these bytes complete, in the order of their arrival."""
        chunks: list[Chunk] = []
        try:
            for event in self._decoder.feed(data):
                if self.done or self.failure is not None:
                    break
                chunks += self._take(event.data)
        except SiluetteError as error:
            self.failure = error
        return chunks

    def end(self) -> None:
        """There are no more bytes: without `[DONE]` before, that is a failure."""
        if not self.done and self.failure is None:
            self.failure = StreamInterrupted("the connection was closed before the end of the stream")

    @property
    def completion(self) -> Completion:
        """What has arrived so far, as one answer.

        Raises:
            InvalidAnswer: Nothing has arrived yet, or no event said which activation and seed were used.
        """
        if not self._head:
            raise InvalidAnswer("no event of the stream has arrived yet")
        choices = [self._choices[index].freeze(index) for index in sorted(self._choices)]
        try:
            return Completion.model_validate(self._head | {"choices": choices})
        except ValidationError as error:
            raise _not_the_api(error) from error

    def _take(self, data: str) -> list[Chunk]:
        if data == DONE:
            self.done = True
            return []
        event = _parse(StreamEvent, data)
        if event.error is not None:
            raise error_of_event(event.error, _text(self._head.get("id")))
        for name in ("id", "model", "created", "system_fingerprint", "usage", "activation", "seed"):
            value = getattr(event, name)
            if value is not None:
                self._head[name] = value
        for chunk in event.choices:
            self._choices.setdefault(chunk.index, _GrowingChoice()).add(chunk)
        return event.choices


class _GrowingChoice:
    """A sample whose pieces are still coming."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] | None = None
        self._finish_reason: str | None = None
        self._sparsity: float | None = None

    def add(self, chunk: Chunk) -> None:
        """One more piece."""
        self._texts.append(chunk.text)
        self._finish_reason = chunk.finish_reason or self._finish_reason
        self._sparsity = self._sparsity if chunk.sparsity is None else chunk.sparsity
        if chunk.logprobs is not None:
            self._logprobs = self._logprobs or []
            self._logprobs += chunk.logprobs

    def freeze(self, index: int) -> Choice:
        """What has come so far."""
        logprobs = None if self._logprobs is None else list(self._logprobs)
        return Choice(
            index=index,
            text="".join(self._texts),
            finish_reason=self._finish_reason,
            logprobs=logprobs,
            sparsity=self._sparsity,
        )


def _parse(kind: type[AnswerT], content: bytes | str) -> AnswerT:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise _not_the_api(error) from error


def _not_the_api(error: ValidationError) -> InvalidAnswer:
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "the answer"
    return InvalidAnswer(f"the answer is not that of a Siluette server: {place}: {first['msg']}")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
