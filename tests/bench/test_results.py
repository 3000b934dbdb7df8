"""The form of benchmark results."""

import argparse
import json
from pathlib import Path

from bench.results import FOLDER, add_out_option, save, spread
from server.machine import describe_machine


def test_result_carries_settings_and_machine(tmp_path: Path) -> None:
    path = save("test", {"streams": 3}, {"tokens_per_second": 1.5}, tmp_path / "new")
    assert path == tmp_path / "new" / f"test-{describe_machine().slug}.json"
    document = json.loads(path.read_text())
    assert set(document) == {"benchmark", "finished", "machine", "settings", "results"}
    assert document["settings"] == {"streams": 3}
    assert document["results"] == {"tokens_per_second": 1.5}
    assert document["machine"]["packages"] == describe_machine().packages


def test_results_go_to_the_repository_by_default() -> None:
    parser = argparse.ArgumentParser()
    add_out_option(parser)
    assert parser.parse_args([]).out == FOLDER == Path(__file__).parents[2] / "bench" / "results"


def test_spread_is_median_and_extremes() -> None:
    assert spread([3.0, 1.0, 10.004]) == {"median": 3.0, "min": 1.0, "max": 10.0}
