"""A client that costs as little as a client in Python can: raw sockets, one `select` loop, no parsing of events.

`bench.http_overhead` runs it as a process of its own. It reads its task from standard input, `{"host", "port", "path",
"bodies"}`, sends each body on a connection of its own, reads all answers to their end and prints `{"seconds",
"cpu_seconds", "tokens", "events"}`. The clock runs from the first request sent, with all connections open, to the end
of the last answer. Token counts come from the usage chunks.
"""

import json
import re
import selectors
import socket
import sys
import time

DONE = b"data: [DONE]"
EVENT = b"data: {"
TAIL_BYTES = 4096  # the usage chunk and [DONE] fit in it
COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')


class Answer:
    """One connection and what is kept of its answer: the number of events, and the end."""

    def __init__(self, host: str, port: int) -> None:
        self.connection = socket.create_connection((host, port))
        self.events = 0
        self._tail = b""

    def send(self, path: str, body: str) -> None:
        """Send the request."""
        content = body.encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        self.connection.sendall(head.encode() + content)

    def receive(self) -> bool:
        """Take what has arrived; true at the end of the answer.

        Raises:
            ConnectionError: The server closed the connection before that.
        """
        data = self.connection.recv(65536)
        if not data:
            raise ConnectionError(f"the answer broke off: {self._tail[-300:]!r}")
        kept = self._tail[-(len(EVENT) - 1) :]  # an event's beginning may be cut in two
        self.events += (kept + data).count(EVENT)
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        return DONE in self._tail

    @property
    def tokens(self) -> int:
        """Generated tokens, as the usage chunk says.

        Raises:
            ValueError: The answer holds none: it was an error.
        """
        found = COMPLETION_TOKENS.findall(self._tail)
        if not found:
            raise ValueError(f"the answer reports no usage: {self._tail[-300:]!r}")
        return int(found[-1])


def main() -> None:
    """Do one task."""
    task = json.load(sys.stdin)
    answers = [Answer(task["host"], task["port"]) for _ in task["bodies"]]
    selector = selectors.DefaultSelector()
    for answer in answers:
        selector.register(answer.connection, selectors.EVENT_READ, answer)
    start, cpu = time.perf_counter(), time.process_time()
    for answer, body in zip(answers, task["bodies"], strict=True):
        answer.send(task["path"], body)
    while selector.get_map():
        for key, _ in selector.select():
            if key.data.receive():
                selector.unregister(key.fileobj)
    result = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "tokens": sum(answer.tokens for answer in answers),
        "events": sum(answer.events for answer in answers),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
