"""From bytes to answers, whole and streamed."""

import json
from pathlib import Path
from typing import Any

import pytest

from siluette_client import Chunk, Completion, InvalidAnswer, StreamFailed, StreamInterrupted
from siluette_client.answers import StreamReader, parse_completion, parse_models

RECORDED = (Path(__file__).parent / "recorded" / "completion.sse").read_bytes()
ECHO = "Grüße aus Köln, 日本語 🎉"
HEAD = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "system_fingerprint": "fp"}
USED = {"activation": {"mode": "relu", "p": None, "seed": None, "scope": "all"}, "seed": 7}


def read(*pieces: bytes) -> tuple[list[Chunk], StreamReader]:
    reader = StreamReader()
    chunks = [chunk for piece in pieces for chunk in reader.feed(piece)]
    reader.end()
    return chunks, reader


def event(choice: dict[str, Any], **more: Any) -> bytes:
    return b"data: " + json.dumps({**HEAD, "choices": [choice], **more}).encode() + b"\n\n"


def test_a_recorded_stream() -> None:
    chunks, reader = read(RECORDED)

    assert (reader.done, reader.failure) == (True, None)
    assert {chunk.index for chunk in chunks} == {0, 1}
    completion = reader.completion
    assert completion.sparsity is None  # of a server that did not say it
    assert [text.startswith(ECHO) for text in completion.texts] == [True, True]
    assert [choice.finish_reason for choice in completion.choices] == ["length", "length"]
    assert (completion.activation.mode, completion.activation.p, completion.activation.seed) == ("stochastic", 0.6, 5)
    assert completion.seed == 5
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (20, 12)


def test_a_cut_at_any_byte_gives_the_same_chunks_and_the_same_answer() -> None:
    chunks, reader = read(RECORDED)
    for cut in range(len(RECORDED) + 1):
        pieces, other = read(RECORDED[:cut], RECORDED[cut:])
        assert pieces == chunks
        assert other.completion == reader.completion


def test_a_stream_without_its_end_is_interrupted_wherever_it_is_cut() -> None:
    end = RECORDED.index(b"data: [DONE]\n\n") + len(b"data: [DONE]\n\n")
    for cut in range(end):
        assert isinstance(read(RECORDED[:cut])[1].failure, StreamInterrupted)


def test_pieces_before_an_error_are_not_lost_however_the_bytes_are_cut() -> None:
    error = {"error": {"message": "engine died", "type": "service_unavailable_error", "param": None, "code": "x"}}
    data = event({"index": 0, "text": "a"}, **USED) + b"data: " + json.dumps(error).encode() + b"\n\n"
    for cut in range(len(data)):
        chunks, reader = read(data[:cut], data[cut:])
        assert [chunk.text for chunk in chunks] == ["a"]
        assert isinstance(reader.failure, StreamFailed)
        assert (reader.failure.message, reader.failure.code) == ("engine died", "x")
        assert reader.failure.request_id == "cmpl-1"
        assert reader.completion.text == "a"


@pytest.mark.parametrize("data", [b"<html>", b"[]", b'"a"', b'{"choices": 1}', b'{"choices": [{"text": "a"}]}'])
def test_an_event_that_is_not_the_apis_is_a_failure(data: bytes) -> None:
    _, reader = read(event({"index": 0, "text": "a"}, **USED) + b"data: " + data + b"\n\n")

    assert isinstance(reader.failure, InvalidAnswer)


def test_an_answer_before_the_first_event_is_none() -> None:
    with pytest.raises(InvalidAnswer, match="no event"):
        _ = StreamReader().completion


def test_both_forms_of_logprobs_become_one() -> None:
    text = {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0], "top_logprobs": [{"a": -1.0}, {"c": -0.5, "b": -2.0}]}
    top = [{"token": "c", "logprob": -0.5, "bytes": [99]}, {"token": "b", "logprob": -2.0, "bytes": [98]}]
    chat = {"content": [{"token": "b", "logprob": -2.0, "bytes": [98], "top_logprobs": top}], "refusal": None}
    body = {**HEAD, **USED}
    choice = {"index": 0, "text": "ab", "logprobs": text, "finish_reason": "stop"}
    completion = parse_completion(json.dumps({**body, "choices": [choice]}).encode())
    message = {"role": "assistant", "content": "b"}
    answer = parse_completion(
        json.dumps({**body, "choices": [{"index": 0, "message": message, "logprobs": chat}]}).encode()
    )

    (first, second), (only,) = completion.choices[0].logprobs or (), answer.choices[0].logprobs or ()
    assert (first.token, first.logprob) == ("a", -1.0)
    assert [top.token for top in second.top_logprobs] == [top.token for top in only.top_logprobs] == ["c", "b"]
    assert only.bytes == [98]
    assert answer.text == "b"


def test_what_a_newer_server_adds_is_kept() -> None:
    new = {**HEAD, **USED, "choices": [{"index": 0, "text": "a", "mood": "good"}], "sparsity": 0.7}
    new["activation"] = {"mode": "gelu", "width": 3}
    completion = parse_completion(json.dumps(new).encode())

    assert completion.activation.mode == "gelu"
    assert completion.activation.to_wire() == {"mode": "gelu", "width": 3}
    assert (completion.model_extra or {})["sparsity"] == 0.7
    assert (completion.choices[0].model_extra or {})["mood"] == "good"


def test_an_answer_survives_being_stored() -> None:
    completion = read(RECORDED)[1].completion

    assert Completion.model_validate_json(completion.model_dump_json()) == completion


@pytest.mark.parametrize("content", [b"", b"<html>", b"{}", b'{"data": [{"id": "m"}]}', b"\xff"])
def test_an_answer_that_is_not_the_apis_says_so(content: bytes) -> None:
    for parse in (parse_completion, parse_models):
        with pytest.raises(InvalidAnswer, match="not that of a Siluette server"):
            parse(content)
