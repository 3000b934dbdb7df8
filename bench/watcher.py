"""Watches a server for `bench.observability`, from a process of its own: receives its traces, and scrapes it.

The first line that it prints is the port of its OTLP receiver. Each line that it reads is a command, answered by a line
of JSON that counts spans and scrapes so far: `scrape URL` (each second from now on) or `rest`. It ends with its input.
"""

import gzip
import json
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

INTERVAL = 1.0  # seconds between scrapes


class Receiver(BaseHTTPRequestHandler):
    """Counts spans and throws them away."""

    spans = 0

    def do_POST(self) -> None:
        """Take an export request."""
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        Receiver.spans += sum(len(scope.spans) for item in request.resource_spans for scope in item.scope_spans)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


class Scraper(threading.Thread):
    """Reads an address each second, while it has one."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.url: str | None = None
        self.scrapes = 0

    def run(self) -> None:
        """Until the process ends."""
        while True:
            if (url := self.url) is not None:
                with urllib.request.urlopen(url) as response:
                    response.read()
                self.scrapes += 1
            time.sleep(INTERVAL if url is not None else 0.05)


def main() -> None:
    """Serve and obey."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    scraper = Scraper()
    scraper.start()
    print(server.server_port, flush=True)
    for line in sys.stdin:
        command, _, url = line.strip().partition(" ")
        scraper.url = url if command == "scrape" else None
        print(json.dumps({"spans": Receiver.spans, "scrapes": scraper.scrapes}), flush=True)


if __name__ == "__main__":
    main()
