"""Server-sent events out of bytes that arrive in any pieces.

The format is the WHATWG's "event stream interpretation": UTF-8 after an optional byte order mark, lines that end with
CR, LF or CRLF, an event at each empty line. Lines are split before they are decoded, so a character that arrives in two
pieces is never decoded in two.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from siluette_client.errors import InvalidAnswer

MAX_EVENT_BYTES = 16 * 1024 * 1024
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CR, LF = 13, 10


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event.

    Attributes:
        data: Its data lines, joined by line feeds.
        event: Its type.
        id: The last id that the stream has named up to here; empty if none.
    """

    data: str
    event: str = "message"
    id: str = ""


class SSEDecoder:
    """Takes the bytes of one stream and gives its events. An event without its empty line is none, as the format asks.

    Args:
        max_event_bytes: Longest line, and most data of one event, in bytes.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._line = bytearray()  # the beginning of a line whose end has not come yet
        self._after_cr = False  # the last byte was a CR, so a LF that follows ends no second line
        self._first_line = True
        self._data: list[str] = []
        self._data_bytes = 0
        self._event = ""
        self._id = ""

    def feed(self, data: bytes) -> Iterator[ServerSentEvent]:
        """The events that these bytes complete. The bytes are decoded while the events are taken: take them all.

        Raises:
            InvalidAnswer: A line or an event is longer than `max_event_bytes`.
        """
        start = 0
        while start < len(data):
            if self._after_cr:
                self._after_cr = False
                if data[start] == LF:
                    start += 1
                    continue
            end = _end_of_line(data, start)
            self._line += data[start:end]
            self._check_length(len(self._line))
            if end == len(data):
                break
            self._after_cr = data[end] == CR
            start = end + 1
            line = bytes(self._line)
            self._line.clear()
            event = self._take_line(line)
            if event is not None:
                yield event

    def _take_line(self, line: bytes) -> ServerSentEvent | None:
        if self._first_line:
            self._first_line = False
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line:
            return self._dispatch()
        if line.startswith(b":"):
            return None  # a comment; servers send them to keep connections alive
        name, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
            self._data_bytes += len(line)
            self._check_length(self._data_bytes)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
        return None  # `retry` is for clients that reconnect by themselves, which a text cannot; others are unknown

    def _dispatch(self) -> ServerSentEvent | None:
        event = None
        if self._data:
            event = ServerSentEvent("\n".join(self._data), self._event or "message", self._id)
        self._data, self._data_bytes, self._event = [], 0, ""
        return event

    def _check_length(self, length: int) -> None:
        if length > self._max_event_bytes:
            raise InvalidAnswer(f"an event of the stream is longer than {self._max_event_bytes} bytes")


def _end_of_line(data: bytes, start: int) -> int:
    """Position of the first CR or LF from `start` on, or the length of `data`."""
    lf = data.find(b"\n", start)
    end = len(data) if lf < 0 else lf
    cr = data.find(b"\r", start, end)
    return end if cr < 0 else cr
