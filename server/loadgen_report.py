"""From the records of a run to figures: distributions, throughput, a table and a JSON document."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from server.loadgen_client import StreamRecord
from server.loadgen_workload import MODES

MS = 1000.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request: a record, or a failure.

    Attributes:
        error: (kind, message); None if the answer was complete.
    """

    mode: str
    record: StreamRecord | None = None
    error: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Distribution:
    """A sample of measurements, to three decimals."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Distribution | None":
        """None of an empty sample."""
        ordered = sorted(values)
        if not ordered:
            return None
        mean = math.fsum(ordered) / len(ordered)
        p50, p90, p99 = (percentile(ordered, q) for q in (50, 90, 99))
        return cls(*(round(value, 3) for value in (mean, p50, p90, p99, ordered[-1])))


def percentile(ordered: Sequence[float], q: float) -> float:
    """Percentile by linear interpolation, as `numpy.percentile`, which the client need not load.

    Args:
        ordered: At least one value, ascending.
        q: In [0, 100].
    """
    rank = (len(ordered) - 1) * q / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of a group of requests. Times in milliseconds.

    Attributes:
        cached_tokens: Input tokens that the server took from its prefix cache.
        ttft: From sending a request to its first text.
        itl: Between two pieces of text of one answer.
        tpot: Per answer, time from its first text to its end for each token after the first.
        e2e: From sending a request to the end of its answer.
    """

    completed: int
    failed: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft: Distribution | None
    itl: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "Summary":
        """Summarise some outcomes; only complete answers count in everything but `failed`."""
        records = [outcome.record for outcome in outcomes if outcome.record is not None]
        usages = [record.usage for record in records if record.usage is not None]
        timed = [record for record in records if record.piece_times]
        return cls(
            completed=len(records),
            failed=len(outcomes) - len(records),
            input_tokens=sum(usage.input_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in usages),
            output_tokens=sum(map(output_tokens, records)),
            ttft=Distribution.of(MS * (record.piece_times[0] - record.started) for record in timed),
            itl=Distribution.of(
                MS * (later - earlier)
                for record in timed
                for earlier, later in zip(record.piece_times, record.piece_times[1:], strict=False)
            ),
            tpot=Distribution.of(
                MS * (record.finished - record.piece_times[0]) / (tokens - 1)
                for record in timed
                if (tokens := output_tokens(record)) > 1
            ),
            e2e=Distribution.of(MS * (record.finished - record.started) for record in records),
        )


def output_tokens(record: StreamRecord) -> int:
    """Tokens of one answer; its pieces where the server reports no usage."""
    return len(record.piece_times) if record.usage is None else record.usage.output_tokens


@dataclass(frozen=True, slots=True)
class ErrorCount:
    """Failures of one kind, with the message of the first."""

    kind: str
    count: int
    example: str


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a run.

    Attributes:
        started: Time of day in ISO 8601, UTC.
        duration: Seconds from the first request sent to the last answer's end.
        config: The settings of the run, as plain JSON values.
        client_cpu_seconds: Processor time that the load generator itself used in the measured part.
        exact_prompts: Whether prompt lengths were measured with the server's tokenizer.
        usage_reported: Whether the server reports token counts; without, output tokens are counted as pieces of text.
    """

    started: str
    duration: float
    config: dict[str, Any]
    client_cpu_seconds: float
    exact_prompts: bool
    usage_reported: bool
    total: Summary
    by_mode: dict[str, Summary]
    errors: tuple[ErrorCount, ...]

    @classmethod
    def of(
        cls,
        outcomes: Sequence[Outcome],
        *,
        started: str,
        duration: float,
        config: dict[str, Any],
        client_cpu_seconds: float,
        exact_prompts: bool,
    ) -> "Report":
        """Summarise a run."""
        modes = [mode for mode in MODES if any(outcome.mode == mode for outcome in outcomes)]
        records = [outcome.record for outcome in outcomes if outcome.record is not None]
        return cls(
            started=started,
            duration=duration,
            config=config,
            client_cpu_seconds=client_cpu_seconds,
            exact_prompts=exact_prompts,
            usage_reported=bool(records) and all(record.usage is not None for record in records),
            total=Summary.of(outcomes),
            by_mode={mode: Summary.of([outcome for outcome in outcomes if outcome.mode == mode]) for mode in modes},
            errors=_count_errors(outcomes),
        )

    @property
    def throughput(self) -> dict[str, float]:
        """Requests, input tokens and output tokens of complete answers, each per second."""
        amounts = {
            "requests": self.total.completed,
            "input_tokens": self.total.input_tokens,
            "output_tokens": self.total.output_tokens,
        }
        return {f"{name}_per_second": amount / self.duration for name, amount in amounts.items()}

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        throughput = {name: round(rate, 3) for name, rate in self.throughput.items()}
        return {"throughput": throughput, **asdict(self)}


def _count_errors(outcomes: Sequence[Outcome]) -> tuple[ErrorCount, ...]:
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    examples = dict(reversed(errors))  # the first message of a kind stays
    return tuple(ErrorCount(kind, count, examples[kind]) for kind, count in Counter(k for k, _ in errors).most_common())


def print_report(report: Report, console: Console) -> None:
    """Print the tables of a run."""
    total, throughput = report.total, report.throughput
    overview = Table(title="Serving benchmark", title_justify="left", box=box.SIMPLE, pad_edge=False, show_header=False)
    overview.add_column()
    overview.add_column(justify="right")
    rows = {
        "Completed requests": f"{total.completed}",
        "Failed requests": f"{total.failed}",
        "Duration": f"{report.duration:.2f} s",
        "Requests": f"{throughput['requests_per_second']:.2f} /s",
        "Input tokens": _tokens(total.input_tokens, throughput["input_tokens_per_second"]),
        "  from the prefix cache": f"{total.cached_tokens}",
        "Output tokens": _tokens(total.output_tokens, throughput["output_tokens_per_second"]),
        "Load generator's own CPU": f"{report.client_cpu_seconds:.2f} s",
    }
    for name, value in rows.items():
        overview.add_row(name, value)
    notes = Text()
    if total.completed and not report.usage_reported:
        notes.append("The server reports no token counts: input is unknown, output tokens are pieces of text.\n")
    if not report.exact_prompts:
        notes.append("The server has no /tokenize: prompt lengths are approximate.\n")
    for error in report.errors:
        notes.append(f"{error.count} x {error.kind}: {error.example}\n", style="red")
    groups = {"all": total} if len(report.by_mode) == 1 else {"all": total, **report.by_mode}
    console.print(Group(overview, _latency_table(groups), notes))


def _tokens(count: int, rate: float) -> str:
    return f"{count} ({rate:.1f} /s)"


def _latency_table(groups: dict[str, Summary]) -> Table:
    """Fits 80 columns."""
    table = Table(title="Latency in ms", title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column("requests", no_wrap=True)
    for name in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    names = {"ttft": "First token", "itl": "Inter-token", "tpot": "Per output token", "e2e": "End to end"}
    for key, title in names.items():
        for index, (mode, summary) in enumerate(groups.items()):
            values: Distribution | None = getattr(summary, key)
            cells = ["-"] * 5 if values is None else [f"{value:.1f}" for value in asdict(values).values()]
            last = index == len(groups) - 1
            table.add_row(title if index == 0 else "", f"{summary.completed} {mode}", *cells, end_section=last)
    return table
