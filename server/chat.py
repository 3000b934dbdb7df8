"""`POST /v1/chat/completions`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import orjson
from fastapi import APIRouter, Body, Request, Response

from engine import InvalidRequest, RequestOutput, SampleOutput
from engine.tokenizer import Tokenizer
from server.documentation import CHAT_EXAMPLES, ERRORS, streamed
from server.encoding import encode_messages
from server.generation import Generation
from server.logprobs import chat_logprobs
from server.protocol import ChatCompletionRequest
from server.responses import ChatChoice, ChatChunkChoice, ChatCompletionResponse, ChatDelta, choice_end
from server.services import ServicesDep
from server.streaming import EventStream, abort_on_disconnect, stream_events

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={**streamed(ChatCompletionResponse, "a `chat.completion.chunk` with a piece of one choice"), **ERRORS},
)
async def create_chat_completion(
    services: ServicesDep,
    request: Request,
    body: Annotated[ChatCompletionRequest, Body(openapi_examples=CHAT_EXAMPLES)],
) -> Response:
    """Write the next message of a conversation."""
    services.check_model(body.model)
    tokenizer = services.engine.tokenizer
    with _fields_as_sent(body):
        sampling, activation = body.to_sampling(), body.activation.to_activation()
        prompt = await encode_messages(tokenizer, body.messages)
        generation = Generation.submit(services, "chatcmpl", [prompt], sampling, activation, request.headers)
    if body.stream:
        head = generation.head("chat.completion.chunk")
        choices = _ChoiceStream(tokenizer)
        return EventStream(stream_events(generation, head, choices.format, body.include_usage), generation)
    async with abort_on_disconnect(request.receive, generation):
        outputs = await generation.collect()
    answer: ChatCompletionResponse = {
        **generation.head("chat.completion"),
        "choices": _choices(outputs, tokenizer),
        **generation.end,
    }
    return Response(orjson.dumps(answer), headers={"x-request-id": generation.id}, media_type="application/json")


@contextmanager
def _fields_as_sent(body: ChatCompletionRequest) -> Iterator[None]:
    """The engine knows a prompt and max_tokens; errors name the fields that this endpoint's client sent."""
    names = {"prompt": "messages"}
    if body.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    try:
        yield
    except InvalidRequest as error:
        error.field = names.get(error.field or "", error.field)
        raise


def _choices(outputs: Sequence[RequestOutput], tokenizer: Tokenizer) -> list[ChatChoice]:
    return [
        {
            "index": sample.index,
            "message": {"role": "assistant", "content": sample.text, "refusal": None},
            "logprobs": None if sample.logprobs is None else chat_logprobs(sample.logprobs, tokenizer),
            **choice_end(sample),
        }
        for output in outputs
        for sample in sorted(output.samples, key=lambda sample: sample.index)
    ]


class _ChoiceStream:
    """Pieces of choices; the first one of each says who speaks."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._begun: set[int] = set()

    def format(self, index: int, sample: SampleOutput) -> ChatChunkChoice | None:
        """The next piece of a choice."""
        if not sample.text and sample.logprobs is None and sample.finish_reason is None:
            return None  # an incomplete character, or what may become a stop string
        delta: ChatDelta = {"content": sample.text}
        if index not in self._begun:
            self._begun.add(index)
            delta = {"role": "assistant", "content": sample.text}
        logprobs = None if sample.logprobs is None else chat_logprobs(sample.logprobs, self._tokenizer)
        return {"index": index, "delta": delta, "logprobs": logprobs, **choice_end(sample)}
