"""Server-sent events, as the WHATWG's specification describes them."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siluette_client.errors import InvalidAnswer
from siluette_client.sse import ServerSentEvent, SSEDecoder

# What a real server sent, for a prompt with characters of two, three and four bytes that it echoes.
RECORDED = (Path(__file__).parent / "recorded" / "completion.sse").read_bytes()

EVENTS = {
    "one": (b"data: a\n\n", [ServerSentEvent("a")]),
    "several lines": (b"data: a\ndata:\ndata: b\n\n", [ServerSentEvent("a\n\nb")]),
    "only the first space goes": (b"data:  a \n\n", [ServerSentEvent(" a ")]),
    "no space": (b"data:a\n\n", [ServerSentEvent("a")]),
    "colon in value": (b"data: a: b\n\n", [ServerSentEvent("a: b")]),
    "field without colon": (b"data\n\n", [ServerSentEvent("")]),
    "type": (b"event: x\ndata: a\n\ndata: b\n\n", [ServerSentEvent("a", "x"), ServerSentEvent("b")]),
    "id stays": (b"id: 7\ndata: a\n\ndata: b\n\n", [ServerSentEvent("a", id="7"), ServerSentEvent("b", id="7")]),
    "id with NUL is ignored": (b"id: 7\0\ndata: a\n\n", [ServerSentEvent("a")]),
    "comment": (b": ping\n\ndata: a\n: ping\n\n", [ServerSentEvent("a")]),
    "unknown field": (b"retry: 5\nfoo: 1\ndata: a\n\n", [ServerSentEvent("a")]),
    "type without data": (b"event: x\n\ndata: a\n\n", [ServerSentEvent("a")]),
    "without empty line": (b"data: a\n\ndata: b\n", [ServerSentEvent("a")]),
    "byte order mark": (b"\xef\xbb\xbfdata: a\n\n", [ServerSentEvent("a")]),
    "mark of the second line": (b"\n\xef\xbb\xbfdata: a\n\n", []),
    "CR": (b"data: a\rdata: b\r\r", [ServerSentEvent("a\nb")]),
    "CRLF": (b"data: a\r\ndata: b\r\n\r\n", [ServerSentEvent("a\nb")]),
    "mixed": (b"data: a\r\r\ndata: b\n\r", [ServerSentEvent("a"), ServerSentEvent("b")]),
    "NEL and line separator end no line": (
        "data: a\u0085b\u2028c\x0bd\n\n".encode(),
        [ServerSentEvent("a\x85b\u2028c\x0bd")],
    ),
    "malformed UTF-8": (b"data: a\xffb\n\n", [ServerSentEvent("a\ufffdb")]),
    "four-byte character": ("data: 🎉\n\n".encode(), [ServerSentEvent("🎉")]),
}


def decode(*pieces: bytes) -> list[ServerSentEvent]:
    decoder = SSEDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


@pytest.mark.parametrize(("data", "events"), EVENTS.values(), ids=EVENTS)
def test_events_of_the_specification(data: bytes, events: list[ServerSentEvent]) -> None:
    assert decode(data) == events


@pytest.mark.parametrize(("data", "events"), EVENTS.values(), ids=EVENTS)
def test_a_cut_at_any_byte_changes_nothing(data: bytes, events: list[ServerSentEvent]) -> None:
    for cut in range(len(data) + 1):
        assert decode(data[:cut], data[cut:]) == events
    assert decode(*(bytes([byte]) for byte in data)) == events


@pytest.mark.parametrize("line_end", [b"\n", b"\r", b"\r\n"], ids=["LF", "CR", "CRLF"])
def test_a_cut_at_any_byte_of_a_recorded_stream_changes_nothing(line_end: bytes) -> None:
    data = RECORDED.replace(b"\n", line_end)
    whole = decode(data)
    assert whole[-1].data == "[DONE]"
    assert "日本語 🎉" in whole[0].data
    for cut in range(len(data) + 1):
        assert decode(data[:cut], data[cut:]) == whole
    assert decode(*(bytes([byte]) for byte in data)) == whole


@given(
    text=st.text(st.sampled_from("data:\r\n e\ufeffü🎉id\0"), max_size=60),
    cuts=st.lists(st.integers(0, 200), max_size=10),
)
def test_any_cuts_of_any_bytes_change_nothing(text: str, cuts: list[int]) -> None:
    data = text.encode()
    borders = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[start:end] for start, end in pairwise(borders)]

    assert decode(*pieces) == decode(data)


def test_an_event_ends_with_the_first_byte_that_can_end_it() -> None:
    decoder = SSEDecoder()

    assert list(decoder.feed(b"data: a\r\n\r")) == [ServerSentEvent("a")]
    assert list(decoder.feed(b"\ndata: b\n\n")) == [ServerSentEvent("b")]


@pytest.mark.parametrize("data", [b"data: " + b"x" * 100, b"data: xxxx\n" * 10], ids=["line", "event"])
def test_a_server_cannot_fill_the_memory(data: bytes) -> None:
    with pytest.raises(InvalidAnswer, match="longer than 64 bytes"):
        list(SSEDecoder(max_event_bytes=64).feed(data))
