"""Log-probabilities in the two forms of the API."""

from collections.abc import Sequence

from engine import PositionLogprobs, TokenLogprob
from engine.tokenizer import Tokenizer
from server.responses import ChatLogprobs, CompletionLogprobs, TokenLogprobs, TopLogprob

FLOOR = -9999.0  # JSON has no infinity; OpenAI sends this number for a token without any probability


def completion_logprobs(positions: Sequence[PositionLogprobs], offset: int) -> tuple[CompletionLogprobs, int]:
    """The completion endpoint's form.

    Args:
        positions: Log-probabilities of consecutive tokens.
        offset: Character offset of the first of them in its choice's text.

    Returns:
        The lists, and the offset of the token that follows.
    """
    tokens = [position.chosen.token for position in positions]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    logprobs: CompletionLogprobs = {
        "tokens": tokens,
        "token_logprobs": [_number(position.chosen) for position in positions],
        "top_logprobs": [_by_text(position) for position in positions],
        "text_offset": offsets,
    }
    return logprobs, offset


def _by_text(position: PositionLogprobs) -> dict[str, float]:
    best: dict[str, float] = {}
    for token in (*position.top, position.chosen):  # OpenAI lists the chosen token even if it is not among the best
        best.setdefault(token.token, _number(token))  # parts of characters share one text: the best one stands for all
    return best


def chat_logprobs(positions: Sequence[PositionLogprobs], tokenizer: Tokenizer) -> ChatLogprobs:
    """The chat endpoint's form."""
    content: list[TokenLogprobs] = [
        {
            **_token(position.chosen, tokenizer),
            "top_logprobs": [_token(token, tokenizer) for token in position.top],
        }
        for position in positions
    ]
    return {"content": content, "refusal": None}


def _token(token: TokenLogprob, tokenizer: Tokenizer) -> TopLogprob:
    return {
        "token": token.token,
        "logprob": _number(token),
        "bytes": list(tokenizer.token_bytes(token.token_id)),
    }


def _number(token: TokenLogprob) -> float:
    return max(token.logprob, FLOOR)
