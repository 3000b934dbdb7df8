"""Every metric of the server: name, kind, labels and meaning. Names are written here only.

Every label takes its values from a fixed set: a metric must not grow with what clients send.
"""

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Type of a metric in Prometheus' terms."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric.

    Attributes:
        name: As it is exposed, unit and suffix included.
        kind: Its type.
        documentation: Its help text.
        labels: Names of its labels.
    """

    name: str
    kind: Kind
    documentation: str
    labels: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """The name without the suffix of its kind, which prometheus-client adds."""
        return self.name.removesuffix({Kind.COUNTER: "_total", Kind.INFO: "_info"}.get(self.kind, ""))


_SPECS: list[MetricSpec] = []


def _metric(kind: Kind, name: str, documentation: str, *labels: str) -> MetricSpec:
    spec = MetricSpec(f"siluette_{name}", kind, documentation, labels)
    _SPECS.append(spec)
    return spec


def _counter(name: str, documentation: str, *labels: str) -> MetricSpec:
    return _metric(Kind.COUNTER, f"{name}_total", documentation, *labels)


def _gauge(name: str, documentation: str, *labels: str) -> MetricSpec:
    return _metric(Kind.GAUGE, name, documentation, *labels)


def _histogram(name: str, documentation: str, *labels: str) -> MetricSpec:
    return _metric(Kind.HISTOGRAM, name, documentation, *labels)


# The server.
ENGINE_UP = _gauge("engine_up", "1 while the engine takes requests")
MODEL = _metric(Kind.INFO, "model_info", "The served model", "name", "architecture", "dtype", "quantization", "version")
HTTP_REQUESTS = _counter(
    "http_requests", "HTTP requests by route template, method and status", "route", "method", "status"
)

# Requests. A request of several prompts counts once for each.
REQUESTS = _counter(
    "requests", "Finished prompts by mode and reason; of several samples' reasons the worst", "mode", "finish_reason"
)
REQUESTS_RUNNING = _gauge("requests_running", "Sequences in the running batch")
REQUESTS_WAITING = _gauge("requests_waiting", "Sequences that wait for a place in the batch")
PROMPT_TOKENS = _counter("prompt_tokens", "Tokens of submitted prompts", "mode")
GENERATION_TOKENS = _counter("generation_tokens", "Tokens generated", "mode")
REQUEST_PROMPT_TOKENS = _histogram("request_prompt_tokens", "Tokens of a prompt", "mode")
REQUEST_GENERATION_TOKENS = _histogram(
    "request_generation_tokens", "Tokens generated for a prompt, of all its samples", "mode"
)

# Latencies.
QUEUE_TIME = _histogram(
    "request_queue_time_seconds", "From the submission of a prompt to its place in the batch", "mode"
)
PREFILL_TIME = _histogram(
    "request_prefill_time_seconds", "From a prompt's place in the batch to its first token", "mode"
)
DECODE_TIME = _histogram(
    "request_decode_time_seconds", "From a prompt's first token to its last one; finished prompts", "mode"
)
FIRST_TOKEN = _histogram("time_to_first_token_seconds", "From the submission of a prompt to its first token", "mode")
INTER_TOKEN = _histogram("inter_token_latency_seconds", "Between one token of a sample and the next", "mode")
REQUEST_LATENCY = _histogram(
    "e2e_request_latency_seconds", "From the submission of a prompt to its last token; finished prompts", "mode"
)

# The KV cache.
KV_BLOCKS = _gauge("kv_blocks", "Blocks of the KV cache")
KV_BLOCKS_CACHED = _gauge("kv_blocks_cached", "Free blocks whose content may be reused")
KV_USAGE = _gauge("kv_cache_usage_ratio", "Share of the KV cache's blocks that live requests hold")
PREFIX_QUERIES = _counter("prefix_cache_queries", "Tokens looked up in the prefix cache, once for each sample")
PREFIX_HITS = _counter("prefix_cache_hits", "Tokens found in the prefix cache")
PREEMPTIONS = _counter("preemptions", "Times a sequence gave its blocks up and was computed again")

# The engine's steps.
STEPS = _counter("engine_steps", "Steps of the engine")
STEP_SECONDS = _counter("engine_step_seconds", "Time spent in steps")
PHASE_SECONDS = _counter("engine_phase_seconds", "Time spent in steps, by what was done", "phase")
WEIGHT_BYTES = _counter(
    "weight_bytes_read", "Bytes of weights that steps read: each weight once for a step, skipped ones not"
)

# What activations do.
FFN_ELEMENTS = _counter("ffn_elements", "Activated gate values, by mode and group of layers", "mode", "layers")
FFN_ZEROS = _counter("ffn_zeros", "Activated gate values that are 0, by mode and group of layers", "mode", "layers")
FFN_SPARSITY = _gauge("ffn_sparsity_ratio", "Share of activated gate values that are 0, since start", "mode")
FFN_ROWS = _counter("ffn_rows", "RELU token rows, by the feed-forward path that the router chose", "path")
FFN_NEURONS = _counter(
    "ffn_neurons", "Neurons whose weights were read or skipped, counted in each layer of each step", "outcome"
)
FFN_FLOPS = _counter(
    "ffn_flops", "Floating-point operations of the feed-forward that were computed or skipped", "mode", "outcome"
)
STOCHASTIC_NEGATIVES = _counter("stochastic_negatives", "Negative gate values in stochastic mode")
STOCHASTIC_KEPT = _counter("stochastic_silu", "Negative gate values in stochastic mode that went through SILU")
STOCHASTIC_EXPECTED = _counter(
    "stochastic_silu_expected", "Negative gate values in stochastic mode times the p of their request"
)

CATALOGUE = {spec.name: spec for spec in _SPECS}
