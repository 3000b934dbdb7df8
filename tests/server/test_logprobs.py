"""Log-probabilities in the API's two forms."""

import math

from engine import AsyncEngine, PositionLogprobs, TokenLogprob
from server.logprobs import FLOOR, chat_logprobs, completion_logprobs


def position(*tokens: tuple[int, str, float]) -> PositionLogprobs:
    chosen, *top = [TokenLogprob(*token) for token in tokens]
    return PositionLogprobs(chosen, tuple(top))


def test_offsets_go_on_where_the_last_piece_ended() -> None:
    first, offset = completion_logprobs([position((1, "ab", -1.0)), position((2, "", -1.0))], 0)
    second, end = completion_logprobs([position((3, "c", -1.0))], offset)

    assert first["text_offset"] == [0, 2]
    assert second["text_offset"] == [2]
    assert end == 3


def test_the_chosen_token_is_listed_even_if_it_is_not_among_the_best() -> None:
    logprobs, _ = completion_logprobs([position((9, "z", -5.0), (1, "a", -0.1), (2, "b", -1.0))], 0)

    assert logprobs["top_logprobs"] == [{"a": -0.1, "b": -1.0, "z": -5.0}]


def test_of_tokens_that_share_a_text_the_best_is_listed() -> None:
    logprobs, _ = completion_logprobs([position((1, "\ufffd", -0.5), (1, "\ufffd", -0.5), (2, "\ufffd", -2.0))], 0)

    assert logprobs["top_logprobs"] == [{"\ufffd": -0.5}]


def test_impossible_tokens_get_a_number_that_json_can_hold(engine: AsyncEngine) -> None:
    impossible = position((5, "x", -math.inf), (5, "x", -math.inf))

    assert completion_logprobs([impossible], 0)[0]["token_logprobs"] == [FLOOR]
    assert chat_logprobs([impossible], engine.tokenizer)["content"][0]["top_logprobs"][0]["logprob"] == FLOOR


def test_chat_gives_the_bytes_of_parts_of_characters(engine: AsyncEngine) -> None:
    token_ids = engine.tokenizer.encode("🦊", add_special_tokens=False)
    positions = [position((token_id, engine.tokenizer.token_text(token_id), -1.0)) for token_id in token_ids]
    content = chat_logprobs(positions, engine.tokenizer)["content"]

    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "🦊"
