"""Figures of a run, from records made by hand."""

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from server.loadgen_client import StreamRecord, Usage
from server.loadgen_report import Distribution, Outcome, Report, Summary, percentile, print_report

STEADY = StreamRecord(started=10.0, piece_times=[10.1, 10.2, 10.3], finished=10.35, usage=Usage(8, 6, 4))
SLOW = StreamRecord(started=20.0, piece_times=[21.0, 21.5], finished=22.0, usage=Usage(12, 2, 0))


def report(*outcomes: Outcome, duration: float = 2.0) -> Report:
    return Report.of(
        outcomes, started="2026-01-01T00:00:00+00:00", duration=duration, config={"seed": 1}, client_cpu_seconds=0.1,
        exact_prompts=True,
    )  # fmt: skip


class TestPercentile:
    @given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
    def test_equals_numpy(self, values: list[float], q: float) -> None:
        assert percentile(sorted(values), q) == pytest.approx(float(np.percentile(values, q)), rel=1e-9, abs=1e-9)

    def test_distribution_of_one_value_is_that_value(self) -> None:
        assert Distribution.of([2.5]) == Distribution(2.5, 2.5, 2.5, 2.5, 2.5)

    def test_distribution_of_nothing_is_none(self) -> None:
        assert Distribution.of([]) is None


class TestSummary:
    def test_times_are_milliseconds_between_the_right_moments(self) -> None:
        summary = Summary.of([Outcome("silu", STEADY)])
        assert summary.ttft == Distribution(100, 100, 100, 100, 100)
        assert summary.itl == Distribution(100, 100, 100, 100, 100)
        assert summary.tpot == Distribution(50, 50, 50, 50, 50)  # 250 ms after the first of 6 tokens
        assert summary.e2e == Distribution(350, 350, 350, 350, 350)

    def test_tokens_are_those_that_the_server_reports(self) -> None:
        summary = Summary.of([Outcome("silu", STEADY), Outcome("silu", SLOW)])
        assert (summary.input_tokens, summary.cached_tokens, summary.output_tokens) == (20, 4, 8)

    def test_without_a_report_pieces_count_as_tokens(self) -> None:
        record = StreamRecord(0.0, [1.0, 2.0], 2.0)
        assert Summary.of([Outcome("silu", record)]).output_tokens == 2

    def test_answers_without_text_have_no_first_token(self) -> None:
        summary = Summary.of([Outcome("silu", StreamRecord(0.0, [], 1.0, Usage(3, 1, 0)))])
        assert summary.ttft is None
        assert summary.e2e == Distribution(1000, 1000, 1000, 1000, 1000)


class TestReport:
    def test_rates_are_over_the_whole_duration(self) -> None:
        rates = report(Outcome("silu", STEADY), Outcome("relu", SLOW), duration=4.0).throughput
        assert rates == {"requests_per_second": 0.5, "input_tokens_per_second": 5.0, "output_tokens_per_second": 2.0}

    def test_modes_are_told_apart(self) -> None:
        by_mode = report(Outcome("relu", SLOW), Outcome("silu", STEADY), Outcome("relu", SLOW)).by_mode
        assert {mode: summary.completed for mode, summary in by_mode.items()} == {"silu": 1, "relu": 2}
        assert by_mode["relu"].ttft == Distribution(1000, 1000, 1000, 1000, 1000)

    def test_errors_are_counted_by_kind_with_the_first_message(self) -> None:
        failures = [("http_429", "full"), ("timeout", "slow"), ("http_429", "still full")]
        result = report(Outcome("silu", STEADY), *(Outcome("silu", error=failure) for failure in failures))
        assert [(error.kind, error.count, error.example) for error in result.errors] == [
            ("http_429", 2, "full"),
            ("timeout", 1, "slow"),
        ]
        assert (result.total.completed, result.total.failed) == (1, 3)

    def test_document_is_json(self) -> None:
        document = json.loads(json.dumps(report(Outcome("silu", STEADY), Outcome("relu", error=("x", "y"))).to_json()))
        assert document["config"] == {"seed": 1}
        assert document["total"]["ttft"]["p99"] == 100
        assert document["by_mode"]["relu"] == document["by_mode"]["relu"] | {"failed": 1, "ttft": None}
        assert document["errors"] == [{"kind": "x", "count": 1, "example": "y"}]


class TestPrintReport:
    def printed(self, result: Report) -> str:
        file = io.StringIO()
        print_report(result, Console(file=file, width=80, color_system=None))
        return file.getvalue()

    def test_fits_80_columns_and_shows_every_mode(self) -> None:
        outcomes = [Outcome(mode, record) for mode in ("silu", "stochastic", "relu") for record in (STEADY, SLOW)]
        text = self.printed(report(*outcomes))
        assert "…" not in text
        assert text.count("2 stochastic") == 4
        assert text.count("6 all") == 4

    def test_shows_errors_as_they_are(self) -> None:
        text = self.printed(report(Outcome("silu", error=("http_500", "[red]oh[/red]"))))
        assert "1 x http_500: [red]oh[/red]" in text
