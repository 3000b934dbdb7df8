"""When requests are traced, and where the traces go: to a real receiver of OTLP over HTTP."""

import builtins
import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from pydantic import ValidationError

from engine import AsyncEngine, EngineConfig, InvalidConfig
from server.app import create_app
from server.serve import serve
from server.settings import ServerSettings
from server.tracing_setup import create_tracer, tracing_is_wanted
from tests.server.conftest import client_of, tiny_config


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("OTEL_TRACES_EXPORTER", raising=False)


class Collector:
    """Receives traces as a collector does."""

    def __init__(self) -> None:
        self.received: list[tuple[str, ExportTraceServiceRequest]] = []
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                received.append((self.path, ExportTraceServiceRequest.FromString(body)))
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


async def trace_one_request(tiny_model: Path, settings: ServerSettings) -> None:
    engine = AsyncEngine(tiny_config(tiny_model))
    app = create_app(engine, settings, create_tracer(settings))
    async with app.router.lifespan_context(app), client_of(app) as client:
        await client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2})
    # The lifespan's end sends what is left.


@pytest.mark.parametrize("suffix", ["", "/", "/v1/traces"])
async def test_the_option_names_the_collector(tiny_model: Path, collector: Collector, suffix: str) -> None:
    await trace_one_request(tiny_model, ServerSettings(otlp_endpoint=collector.url + suffix))

    ((path, request),) = collector.received
    assert path == "/v1/traces"
    (resource,) = request.resource_spans
    attributes = {item.key: item.value.string_value for item in resource.resource.attributes}
    assert attributes["service.name"] == "siluette"
    names = {span.name for scope in resource.scope_spans for span in scope.spans}
    assert {"queue", "prefill", "decode"} < names


async def test_so_does_the_standard_variable(
    tiny_model: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "stories")

    await trace_one_request(tiny_model, ServerSettings())

    ((path, request),) = collector.received
    assert path == "/v1/traces"
    attributes = {item.key: item.value.string_value for item in request.resource_spans[0].resource.attributes}
    assert attributes["service.name"] == "stories"


def test_nothing_is_traced_unless_somebody_asks() -> None:
    assert create_tracer(ServerSettings()) is None


@pytest.mark.parametrize(("name", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")])
def test_the_standard_switches_turn_it_off(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    assert tracing_is_wanted(ServerSettings())

    monkeypatch.setenv(name, value)

    assert not tracing_is_wanted(ServerSettings())


def test_without_the_extra_it_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_opentelemetry(name: str, *arguments: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real_import(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", no_opentelemetry)
    settings = ServerSettings(port=0, otlp_endpoint="http://collector:4318")
    with pytest.raises(InvalidConfig, match=r"pip install 'siluette\[otel\]'"):
        serve(EngineConfig(model="/does/not/exist"), settings, progress=lambda line: None)


def test_an_endpoint_must_be_an_address() -> None:
    with pytest.raises(ValidationError, match="otlp_endpoint"):
        ServerSettings(otlp_endpoint="collector:4318")
