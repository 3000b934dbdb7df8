"""Examples and error answers of the OpenAPI page."""

from typing import Any

from fastapi.openapi.models import Example

from server.errors import ErrorResponse

DESCRIPTION = """\
Text generation in which every request chooses how the feed-forward layers are activated:

| `activation.mode` | |
|---|---|
| `silu` | deterministic, the default |
| `stochastic` | each negative gate value goes through SILU with probability `p`, else becomes 0 |
| `relu` | sparse: most gate values are 0 and their neurons are skipped |

The API is OpenAI's, with `activation` and a few sampling fields added. Every answer says which activation and seed were
used; sending them again gives the same text, whatever else the server is doing.
"""

Responses = dict[int | str, dict[str, Any]]


def _error(description: str) -> dict[str, Any]:
    return {"model": ErrorResponse, "description": description}


# "default" also keeps FastAPI from promising its own 422 body, which this server never sends.
ERRORS: Responses = {
    400: _error("The request can never work; `param` names the field at fault"),
    404: _error("The model is not served here"),
    413: _error("The body is too long"),
    429: _error("The queue is full; try again after `Retry-After` seconds"),
    503: _error("The server is shutting down or the engine has stopped"),
    "default": _error("Any other error has the same body"),
}


def streamed(model: Any, event: str) -> Responses:
    """The answer of an endpoint that can stream."""
    return {
        200: {
            "model": model,
            "description": f"The answer. With `stream`, server-sent events: {event} each, the last one is `[DONE]`.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    }


def _examples(common: dict[str, Any]) -> dict[str, Example]:
    return {
        "silu": {
            "summary": "SILU: deterministic, diversity from the temperature",
            "value": {**common, "temperature": 0.7, "seed": 7},
        },
        "stochastic": {
            "summary": "Stochastic: three different greedy answers",
            "value": {
                **common,
                "temperature": 0,
                "n": 3,
                "activation": {"mode": "stochastic", "p": 0.8, "seed": 1234, "scope": "decode"},
            },
        },
        "relu": {
            "summary": "RELU: sparse, streamed (needs a checkpoint tuned for it, or --allow-untuned-activations)",
            "value": {
                **common,
                "stream": True,
                "stream_options": {"include_usage": True},
                "activation": {"mode": "relu"},
            },
        },
    }


COMPLETION_EXAMPLES = _examples({"prompt": "The capital of France is", "max_tokens": 32})
CHAT_EXAMPLES = _examples(
    {"messages": [{"role": "user", "content": "Name three uses of a brick."}], "max_completion_tokens": 64}
)
