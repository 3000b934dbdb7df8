"""Whether requests are traced, and where traces go."""

import os
from typing import TYPE_CHECKING

from engine import InvalidConfig
from server.settings import ServerSettings
from server.version import VERSION

if TYPE_CHECKING:
    from server.tracing import RequestTracer

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
TRACES_PATH = "/v1/traces"


def tracing_is_wanted(settings: ServerSettings) -> bool:
    """Whether an endpoint is named, by an option or a standard variable of OpenTelemetry, and tracing is not off."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return settings.otlp_endpoint is not None or any(os.environ.get(name) for name in ENDPOINT_VARIABLES)


def create_tracer(settings: ServerSettings) -> "RequestTracer | None":
    """What traces requests, or None if nobody asked for it.

    Spans are exported in batches by a thread of their own, as OTLP over HTTP. The other `OTEL_` variables (sampler,
    headers, time-outs, resource attributes, sizes of batches) mean what OpenTelemetry's SDK says.

    Raises:
        InvalidConfig: Traces are asked for, and the extra `otel` is not installed.
    """
    if not tracing_is_wanted(settings):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from server.tracing import RequestTracer
    except ImportError as error:
        raise InvalidConfig(
            "otlp_endpoint, or OTEL_EXPORTER_OTLP_ENDPOINT, asks for traces, which need OpenTelemetry: "
            "pip install 'siluette[otel]'; OTEL_SDK_DISABLED=true turns them off"
        ) from error
    resource = Resource.create({SERVICE_VERSION: VERSION})
    if "OTEL_SERVICE_NAME" not in os.environ and "service.name=" not in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        resource = resource.merge(Resource({SERVICE_NAME: "siluette"}))
    exporter = OTLPSpanExporter(endpoint=_traces_url(settings.otlp_endpoint))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return RequestTracer(provider)


def _traces_url(endpoint: str | None) -> str | None:
    """The endpoint's path for traces; None leaves the address to the environment."""
    if endpoint is None:
        return None
    base = endpoint.rstrip("/")
    return base if base.endswith(TRACES_PATH) else base + TRACES_PATH
