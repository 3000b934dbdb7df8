"""From rounds to medians and ratios."""

from typing import Any

import pytest

from bench.peers import print_results, results_of
from bench.peers_catalogue import PEERS
from bench.peers_results import TARGETS, Record, Target, compare, median, rate
from bench.peers_session import Load, Session


def load(streams: int, rate: float, decode: float | None = None, failed: int = 0) -> Load:
    return Load(streams, 4, 512, rate, decode, failed)


def record(name: str, *sessions: Session, errors: tuple[str, ...] = ()) -> Record:
    return Record(name.upper(), f"run {name}", {"torch": "2"}, list(sessions), list(errors))


def results(**rates: float) -> dict[str, Any]:
    """One peer for each argument, with its tokens per second at one stream."""
    return {
        name: record(name, Session((load(1, value),), ttft_ms=1000 / value)).to_json() for name, value in rates.items()
    }


class TestRecord:
    def test_has_the_spread_over_the_rounds(self) -> None:
        rounds = [
            Session((load(1, value, 2 * value), load(8, 3 * value)), ttft_ms=value) for value in (10.0, 30.0, 20.0)
        ]
        document = record("a", *rounds).to_json()
        assert document["rounds"] == 3
        assert list(document["streams"]) == ["1", "8"]
        one, eight = document["streams"].values()
        assert one["tokens_per_second"] == {"median": 20.0, "min": 10.0, "max": 30.0}
        assert one["decode_tokens_per_second"]["median"] == 40.0
        assert (one["requests"], one["output_tokens"], one["failed"]) == (12, 1536, 0)
        assert eight["tokens_per_second"]["median"] == 60.0
        assert "decode_tokens_per_second" not in eight
        assert document["ttft_ms"]["median"] == 20.0
        assert "memory_mib" not in document  # nobody weighed it
        assert "errors" not in document

    def test_keeps_a_peer_that_never_ran_with_its_reason(self) -> None:
        failed = record("a", errors=("pip failed: no such version", "pip failed: no such version"))
        assert failed.hopeless
        document = failed.to_json()
        assert document["errors"] == ["pip failed: no such version"]
        assert document["rounds"] == 0
        assert "streams" not in document

    def test_one_bad_round_does_not_end_it(self) -> None:
        shaky = record("a", Session((load(1, 5.0, failed=2),), 1.0, complaints=("2 of 4: timeout",)), errors=("died",))
        assert not shaky.hopeless
        document = shaky.to_json()
        assert document["streams"]["1"]["failed"] == 2
        assert document["errors"] == ["died", "2 of 4: timeout"]


class TestCompare:
    def test_takes_the_best_peer(self) -> None:
        target = Target("speed", rate(1), "ours", ("slow", "fast"), 1.5)
        (row,) = compare(results(ours=30, slow=10, fast=20), [target])
        assert (row["peer"], row["value"], row["met"], row["at_least"]) == ("fast", 1.5, True, 1.5)

    def test_the_best_time_is_the_least(self) -> None:
        target = Target("wait", median("ttft_ms"), "ours", ("slow", "fast"), 0.9, higher_is_better=False)
        (row,) = compare(results(ours=20, slow=5, fast=10), [target])
        assert (row["peer"], row["value"], row["met"], row["at_most"]) == ("fast", 0.5, True, 0.9)
        (row,) = compare(results(ours=10, slow=5, fast=10), [target])
        assert (row["value"], row["met"]) == (1.0, False)

    def test_names_peers_without_the_figure(self) -> None:
        target = Target("speed", rate(1), "ours", ("broken", "fast", "absent"))
        peers = results(ours=30, fast=20) | {"broken": record("broken", errors=("no",)).to_json()}
        (row,) = compare(peers, [target])
        assert row["missing"] == ["broken", "absent"]
        assert "met" not in row  # there is no limit

    def test_leaves_out_what_cannot_be_compared(self) -> None:
        targets = [
            Target("a", rate(1), "ours", ("absent",)),
            Target("b", rate(8), "ours"),
            Target("c", rate(1), "absent"),
        ]
        assert compare(results(ours=30), targets) == []

    def test_a_figure_alone_is_held_against_its_limit(self) -> None:
        target = Target("first token", median("ttft_ms"), "ours", (), 60.0, higher_is_better=False)
        (row,) = compare(results(ours=20), [target])
        assert (row["value"], row["met"]) == (50.0, True)
        assert "peer" not in row

    def test_targets_name_known_peers(self) -> None:
        named = {name for target in TARGETS for name in (target.ours, *target.peers)}
        assert named <= set(PEERS)
        assert all(target.ours.startswith("siluette") for target in TARGETS)


def test_result_has_peers_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    sessions = {"siluette-bf16": 50.0, "llama-bf16-capi": 40.0}
    records = {name: record(name, Session((load(1, value),), 10.0)) for name, value in sessions.items()}
    records["vllm"] = record("vllm", errors=("[pip] failed",))
    document = results_of(records)
    assert list(document["peers"]) == [*sessions, "vllm"]
    assert next(row for row in document["ratios"] if row["peer"] == "llama-bf16-capi")["value"] == 1.25
    print_results(document, (1, 8), Console(width=200))
    printed = capsys.readouterr().out
    assert "VLLM: [pip] failed" in printed
    assert "1.25" in printed
