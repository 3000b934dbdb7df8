"""The Grafana dashboard, as code: `python -m deploy.grafana.dashboard` writes dashboards/siluette.json.

Queries show one job and any of its instances. Rates are taken over `$__rate_interval`, which Grafana fits to the time
range and the scrape interval.
"""

from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, StackingMode, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef

JSON_PATH = Path(__file__).parent / "dashboards" / "siluette.json"

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
SELECTOR = 'job="$job", instance=~"$instance"'
HEIGHT = 8  # of a panel, in Grafana's grid

ZEROS, ELEMENTS = "siluette_ffn_zeros_total", "siluette_ffn_elements_total"
NEURONS, FLOPS, SKIPPED = "siluette_ffn_neurons_total", "siluette_ffn_flops_total", 'outcome="skipped"'
INSTANCES = 'label_values(siluette_engine_up{job="$job"}, instance)'
NEGATIVES = "siluette_stochastic_negatives_total"


@dataclass(frozen=True, slots=True)
class Query:
    """A query and the name of its series; `{{label}}` stands for a label's value."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel of lines over time.

    Attributes:
        unit: In Grafana's names: `s`, `percentunit`, `short`, `reqps`, `bytes`.
        width: Of 24.
        stacked: Lines are parts of a whole.
        highest: Of the axis, if it has an end.
    """

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    width: int = 8
    stacked: bool = False
    highest: float | None = None


def _rate(metric: str, labels: str = "") -> str:
    selector = f"{SELECTOR}, {labels}" if labels else SELECTOR
    return f"rate({metric}{{{selector}}}[$__rate_interval])"


def _sum(metric: str, by: str = "", labels: str = "") -> str:
    grouped = f"sum by ({by}) " if by else "sum"
    return f"{grouped}({_rate(metric, labels)})"


def _share(part: str, whole: str, by: str = "", labels: str = "", part_labels: str = "") -> str:
    """Share of one rate in another; nothing while the other is 0. `part_labels` narrow the part further."""
    narrow = ", ".join(filter(None, (labels, part_labels)))
    return f"{_sum(part, by, narrow)} / ({_sum(whole, by, labels)} > 0)"


def _quantiles(metric: str) -> tuple[Query, ...]:
    buckets = _sum(f"{metric}_bucket", "mode, le")
    return tuple(
        Query(f"histogram_quantile({quantile}, {buckets})", f"{{{{mode}}}} p{round(100 * quantile)}")
        for quantile in (0.5, 0.95)
    )


ROWS: dict[str, tuple[Panel, ...]] = {
    "Latency by activation mode": (
        Panel(
            "Time to first token",
            "From the submission of a prompt to its first token: queue and prefill.",
            "s",
            _quantiles("siluette_time_to_first_token_seconds"),
        ),
        Panel(
            "Between tokens",
            "Between one token of a sample and the next.",
            "s",
            _quantiles("siluette_inter_token_latency_seconds"),
        ),
        Panel(
            "Whole request",
            "From the submission of a prompt to its last token.",
            "s",
            _quantiles("siluette_e2e_request_latency_seconds"),
        ),
    ),
    "Throughput": (
        Panel(
            "Generated tokens",
            "Tokens a second.",
            "short",
            (Query(_sum("siluette_generation_tokens_total", "mode"), "{{mode}}"),),
            stacked=True,
        ),
        Panel(
            "Prompt tokens",
            "Tokens a second, counted when their request comes.",
            "short",
            (Query(_sum("siluette_prompt_tokens_total", "mode"), "{{mode}}"),),
            stacked=True,
        ),
        Panel(
            "Finished prompts",
            "By activation mode and reason.",
            "reqps",
            (Query(f"{_sum('siluette_requests_total', 'mode, finish_reason')} > 0", "{{mode}} {{finish_reason}}"),),
        ),
    ),
    "Queue and cache": (
        Panel(
            "Sequences",
            "In the running batch, and waiting for a place in it.",
            "short",
            (
                Query(f"sum(siluette_requests_running{{{SELECTOR}}})", "running"),
                Query(f"sum(siluette_requests_waiting{{{SELECTOR}}})", "waiting"),
            ),
            width=6,
        ),
        Panel(
            "Queue time",
            "From the submission of a prompt to its place in the batch.",
            "s",
            _quantiles("siluette_request_queue_time_seconds"),
            width=6,
        ),
        Panel(
            "KV cache in use",
            "Share of the blocks that live requests hold, and preemptions a second.",
            "percentunit",
            (
                Query(f"siluette_kv_cache_usage_ratio{{{SELECTOR}}}", "{{instance}}"),
                Query(_sum("siluette_preemptions_total"), "preemptions a second"),
            ),
            width=6,
        ),
        Panel(
            "Prefix cache hits",
            "Share of the looked-up tokens that were in the cache.",
            "percentunit",
            (Query(_share("siluette_prefix_cache_hits_total", "siluette_prefix_cache_queries_total"), "hits"),),
            width=6,
            highest=1,
        ),
    ),
    "Sparsity": (
        Panel(
            "Zeros by mode",
            "Share of the activated gate values that are 0.",
            "percentunit",
            (Query(_share(ZEROS, ELEMENTS, "mode"), "{{mode}}"),),
            highest=1,
        ),
        Panel(
            "Router: path of RELU rows",
            "Token rows a second; sparse ones skip zeros.",
            "short",
            (Query(_sum("siluette_ffn_rows_total", "path"), "{{path}}"),),
            stacked=True,
        ),
        Panel(
            "Skipped work",
            "Share of neurons whose weights were not read, and of the feed-forward's operations, over all modes.",
            "percentunit",
            (
                Query(_share(NEURONS, NEURONS, part_labels=SKIPPED), "neurons"),
                Query(_share(FLOPS, FLOPS, part_labels=SKIPPED), "operations"),
            ),
            highest=1,
        ),
        Panel(
            "Zeros of RELU rows by layers",
            "Share of zeros in each group of layers.",
            "percentunit",
            (Query(_share(ZEROS, ELEMENTS, "layers", labels='mode="relu"'), "{{layers}}"),),
            width=16,
            highest=1,
        ),
        Panel(
            "p of stochastic rows",
            "Share of negative gate values that went through SILU, and the share that was asked for.",
            "percentunit",
            (
                Query(_share("siluette_stochastic_silu_total", "siluette_stochastic_negatives_total"), "drawn"),
                Query(
                    _share("siluette_stochastic_silu_expected_total", "siluette_stochastic_negatives_total"),
                    "asked for",
                ),
            ),
            highest=1,
        ),
    ),
    "Engine": (
        Panel(
            "Where a step's time goes",
            "Seconds of each phase in a second.",
            "percentunit",
            (Query(_sum("siluette_engine_phase_seconds_total", "phase"), "{{phase}}"),),
            stacked=True,
        ),
        Panel(
            "Weights read for a generated token",
            "Bytes that steps read, prompts included, by tokens generated.",
            "bytes",
            (
                Query(
                    f"{_sum('siluette_weight_bytes_read_total')} / ({_sum('siluette_generation_tokens_total')} > 0)",
                    "bytes a token",
                ),
            ),
        ),
        Panel(
            "Steps",
            "Steps a second, by instance.",
            "short",
            (Query(_sum("siluette_engine_steps_total", "instance"), "{{instance}}"),),
        ),
    ),
    "HTTP": (
        Panel(
            "Requests by route",
            "Answers a second, by route template.",
            "reqps",
            (Query(_sum("siluette_http_requests_total", "route"), "{{route}}"),),
        ),
        Panel(
            "Errors by status",
            "Answers a second with a status of 400 or above.",
            "reqps",
            (Query(_sum("siluette_http_requests_total", "route, status", 'status=~"[45].."'), "{{status}} {{route}}"),),
        ),
        Panel(
            "Failed answers",
            "Prompts a second that ended with an error or were aborted.",
            "reqps",
            (
                Query(
                    _sum("siluette_requests_total", "mode, finish_reason", 'finish_reason=~"error|abort"'),
                    "{{mode}} {{finish_reason}}",
                ),
            ),
        ),
    ),
}


def _panel(panel: Panel) -> timeseries.Panel:
    builder = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.description)
        .unit(panel.unit)
        .datasource(SOURCE)
        .min(0)
        .span(panel.width)
        .height(HEIGHT)
        .fill_opacity(40 if panel.stacked else 8)
        .legend(common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).show_legend(True))
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if panel.stacked:
        builder.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if panel.highest is not None:
        builder.max(panel.highest)
    for number, query in enumerate(panel.queries):
        builder.with_target(
            prometheus.Dataquery()
            .ref_id(chr(ord("A") + number))
            .expr(query.expression)
            .legend_format(query.legend)
            .datasource(SOURCE)
        )
    return builder


def build() -> str:
    """The dashboard's JSON."""
    builder = (
        dashboard.Dashboard("Siluette")
        .uid("siluette")
        .description("Text generation by activation mode: latency, throughput, queue, cache, sparsity, errors.")
        .tags(["siluette"])
        .readonly()
        .timezone("browser")
        .refresh("30s")
        .time("now-1h", "now")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_label_variable("job", "Job", "label_values(siluette_engine_up, job)", several=False))
        .with_variable(
            _label_variable(
                "instance", "Instance", 'label_values(siluette_engine_up{job="$job"}, instance)', several=True
            )
        )
    )
    for title, panels in ROWS.items():
        builder.with_row(dashboard.Row(title))
        for panel in panels:
            builder.with_panel(_panel(panel))
    return JSONEncoder(sort_keys=True, indent=2).encode(builder.build()) + "\n"


def _label_variable(name: str, label: str, query: str, *, several: bool) -> dashboard.QueryVariable:
    builder = dashboard.QueryVariable(name).label(label).query(query).datasource(SOURCE).multi(several)
    return builder.include_all(True).all_value(".*") if several else builder


def main() -> None:
    """Write the dashboard's file."""
    JSON_PATH.write_text(build())
    print(f"Written to {JSON_PATH}")


if __name__ == "__main__":
    main()
