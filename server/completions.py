"""`POST /v1/completions`."""

import asyncio
from collections.abc import Sequence
from typing import Annotated

import orjson
from fastapi import APIRouter, Body, Request, Response

from engine import InvalidRequest, RequestOutput, SampleOutput
from server.documentation import COMPLETION_EXAMPLES, ERRORS, streamed
from server.encoding import encode_text
from server.generation import Generation
from server.logprobs import completion_logprobs
from server.protocol import CompletionRequest, Prompt
from server.responses import CompletionChoice, CompletionLogprobs, CompletionResponse, choice_end
from server.services import Services, ServicesDep
from server.streaming import EventStream, abort_on_disconnect, stream_events

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/completions",
    response_model=None,
    responses={**streamed(CompletionResponse, "the same object with a piece of one choice"), **ERRORS},
)
async def create_completion(
    services: ServicesDep,
    request: Request,
    body: Annotated[CompletionRequest, Body(openapi_examples=COMPLETION_EXAMPLES)],
) -> Response:
    """Continue one or several prompts."""
    services.check_model(body.model)
    sampling, activation = body.to_sampling(), body.activation.to_activation()
    prompts = await _encode(services, body.prompt)
    generation = Generation.submit(services, "cmpl", prompts, sampling, activation, request.headers)
    head = generation.head("text_completion")
    echoes = await asyncio.to_thread(_echoes, services, body, prompts) if body.echo else [""] * len(prompts)
    if body.stream:
        choices = _ChoiceStream(echoes, sampling.n)
        return EventStream(stream_events(generation, head, choices.format, body.include_usage), generation)
    async with abort_on_disconnect(request.receive, generation):
        outputs = await generation.collect()
    answer: CompletionResponse = {**head, "choices": _choices(outputs, echoes, sampling.n), **generation.end}
    return Response(orjson.dumps(answer), headers={"x-request-id": generation.id}, media_type="application/json")


async def _encode(services: Services, prompts: Sequence[Prompt]) -> list[list[int]]:
    limit = services.settings.max_prompts
    if len(prompts) > limit:
        raise InvalidRequest(f"prompt has {len(prompts)} prompts; at most {limit} are allowed", "prompt")
    tokenizer = services.engine.tokenizer
    encoded = []
    for prompt in prompts:
        encoded.append(await encode_text(tokenizer, prompt) if isinstance(prompt, str) else prompt)
        await asyncio.sleep(0)  # many short prompts must not hold up the loop either
    return encoded


def _echoes(services: Services, body: CompletionRequest, prompts: Sequence[Sequence[int]]) -> list[str]:
    """What each prompt's choices begin with."""
    tokenizer = services.engine.tokenizer
    return [
        prompt if isinstance(prompt, str) else tokenizer.decode(token_ids, skip_special_tokens=False)
        for prompt, token_ids in zip(body.prompt, prompts, strict=True)
    ]


def _choices(outputs: Sequence[RequestOutput], echoes: Sequence[str], n: int) -> list[CompletionChoice]:
    choices: list[CompletionChoice] = []
    for number, (output, echo) in enumerate(zip(outputs, echoes, strict=False)):  # fewer outputs if the client left
        for sample in sorted(output.samples, key=lambda sample: sample.index):
            logprobs = None if sample.logprobs is None else completion_logprobs(sample.logprobs, 0)[0]
            choices.append(
                {
                    "index": number * n + sample.index,
                    "text": echo + sample.text,
                    "logprobs": logprobs,
                    **choice_end(sample),
                }
            )
    return choices


class _ChoiceStream:
    """Pieces of choices, which need to know what went before: the echoed prompt, the offset of the text."""

    def __init__(self, echoes: Sequence[str], n: int) -> None:
        self._pending_echo = {p * n + i: echo for p, echo in enumerate(echoes) if echo for i in range(n)}
        self._offsets: dict[int, int] = {}

    def format(self, index: int, sample: SampleOutput) -> CompletionChoice | None:
        """The next piece of a choice."""
        text = sample.text
        if index in self._pending_echo:
            text = self._pending_echo.pop(index) + text
        logprobs: CompletionLogprobs | None = None
        if sample.logprobs is not None:
            logprobs, self._offsets[index] = completion_logprobs(sample.logprobs, self._offsets.get(index, 0))
        elif not text and sample.finish_reason is None:
            return None  # an incomplete character, or what may become a stop string
        return {"index": index, "text": text, "logprobs": logprobs, **choice_end(sample)}
