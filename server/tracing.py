"""Traces of requests by OpenTelemetry: a span for each, and in it queue, prefill and decode spans of each prompt.

Attributes follow the semantic conventions of generative AI (`gen_ai.*`); what only this server has begins with
`siluette.`. All of a request's spans but its own are made when it ends, from times that the metrics note anyway, so
that tracing costs nothing while tokens come.

This module needs the extra `otel`, and is imported only by `server.tracing_setup`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opentelemetry.propagate import extract
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.util.types import AttributeValue

from engine import Activation, FinishReason, SamplingParams
from server.errors import error_kind
from server.metrics import PromptTimes
from server.version import VERSION

OPERATIONS = {"cmpl": "text_completion", "chatcmpl": "chat"}  # by the prefix of an answer's id
PROVIDER = "siluette"


@dataclass(frozen=True, slots=True)
class AnswerFacts:
    """What a request's span says at its end.

    Attributes:
        id: Of the answer.
        seed: Sampling seed that was used.
        activation: That was used.
        input_tokens: Tokens of all prompts; `cached_tokens` of them came from the prefix cache.
        output_tokens: Tokens generated.
    """

    id: str
    seed: int
    activation: Activation
    input_tokens: int
    cached_tokens: int
    output_tokens: int


class RequestTracer:
    """Begins the spans of requests.

    Args:
        provider: Makes and exports spans; `shutdown` shuts it down.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("siluette", VERSION)

    def begin(
        self, id_prefix: str, model: str, sampling: SamplingParams, activation: Activation, headers: Mapping[str, str]
    ) -> "RequestTrace":
        """Begin the span of a request, as a child of the span that the client's `traceparent` names.

        Args:
            id_prefix: Of the answer's id; says which operation it is.
            model: Name of the model in the API.
            sampling: As requested.
            activation: As requested.
            headers: Of the HTTP request.
        """
        operation = OPERATIONS[id_prefix]
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=extract(headers),
            kind=SpanKind.SERVER,
            attributes=_requested(operation, model, sampling, activation),
        )
        return RequestTrace(self, span)

    def child(self, parent: Span, name: str, begin: int, end: int, attributes: Mapping[str, AttributeValue]) -> None:
        """Add a span that is over; times are nanoseconds since 1970."""
        context = set_span_in_context(parent)
        self._tracer.start_span(name, context=context, attributes=attributes, start_time=begin).end(end)

    def shutdown(self) -> None:
        """Export what is left; takes seconds if the collector does not answer."""
        self._provider.shutdown()


class RequestTrace:
    """The span of one request.

    Args:
        tracer: Which began it.
        span: The span.
    """

    def __init__(self, tracer: RequestTracer, span: Span) -> None:
        self._tracer, self._span = tracer, span
        # What turns a time of `perf_counter` into one since 1970.
        self._offset = time.time_ns() - time.perf_counter_ns()

    def refused(self, error: BaseException) -> None:
        """The request never reached the engine."""
        self._fail(error)
        self._span.end()

    def ended(self, facts: AnswerFacts, prompts: Sequence[PromptTimes], error: BaseException | None) -> None:
        """The request is over, by itself, because the client left, or by an error."""
        span = self._span
        if not span.is_recording():
            return
        first_tokens = [times.first_token for times in prompts if times.first_token is not None]
        if first_tokens:
            seconds = min(first_tokens) - min(times.submitted for times in prompts)
            span.set_attribute("gen_ai.response.time_to_first_chunk", seconds)
        span.set_attributes(_answered(facts))
        span.set_attribute("gen_ai.response.finish_reasons", [str(reason) for reason in _reasons(prompts)])
        for number, times in enumerate(prompts):
            self._prompt(number, times)
        if error is not None:
            self._fail(error)
        span.end()

    def _prompt(self, number: int, times: PromptTimes) -> None:
        """The spans of one prompt, as far as it came."""
        attributes: dict[str, AttributeValue] = {"siluette.prompt.index": number}
        points = [times.submitted, times.admitted, times.first_token, times.ended]
        for name, begin, end in zip(("queue", "prefill", "decode"), points, points[1:], strict=False):
            if begin is not None and (end := times.ended if end is None else end) is not None:
                if name == "decode":
                    attributes = {**attributes, "gen_ai.usage.output_tokens": times.tokens}
                self._tracer.child(self._span, name, self._since_1970(begin), self._since_1970(end), attributes)

    def _since_1970(self, seconds: float) -> int:
        return self._offset + int(seconds * 1e9)

    def _fail(self, error: BaseException) -> None:
        self._span.set_attribute("error.type", error_kind(error).code)
        self._span.set_status(StatusCode.ERROR, str(error))


def _requested(
    operation: str, model: str, sampling: SamplingParams, activation: Activation
) -> dict[str, AttributeValue]:
    values: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.request.choice.count": sampling.n,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.stop_sequences": list(sampling.stop) or None,
        "siluette.activation.mode": str(activation.mode),
        "siluette.activation.p": activation.p,
        "siluette.activation.scope": str(activation.scope),
    }
    return {name: value for name, value in values.items() if value is not None}


def _answered(facts: AnswerFacts) -> dict[str, AttributeValue]:
    values: dict[str, AttributeValue | None] = {
        "gen_ai.response.id": facts.id,
        "gen_ai.usage.input_tokens": facts.input_tokens,
        "gen_ai.usage.cache_read.input_tokens": facts.cached_tokens,
        "gen_ai.usage.output_tokens": facts.output_tokens,
        "siluette.seed": facts.seed,
        "siluette.activation.seed": facts.activation.seed,
    }
    return {name: value for name, value in values.items() if value is not None}


def _reasons(prompts: Sequence[PromptTimes]) -> list[FinishReason]:
    """Why each sample ended; for a prompt that did not end by itself, why it did not."""
    reasons: list[FinishReason] = []
    for times in prompts:
        reasons += [times.reasons[index] for index in sorted(times.reasons)]
        if times.reason in (FinishReason.ABORT, FinishReason.ERROR):
            reasons.append(times.reason)
    return reasons
