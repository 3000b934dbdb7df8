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


def test_result_of_a_gpu_is_named_after_it(tmp_path: Path) -> None:
    device = {"name": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0"}
    path = save("test", {}, [], tmp_path, device)
    assert path == tmp_path / "test-nvidia-h100-80gb-hbm3.json"
    assert json.loads(path.read_text())["device"] == device


def test_results_go_to_the_repository_by_default() -> None:
    parser = argparse.ArgumentParser()
    add_out_option(parser)
    assert parser.parse_args([]).out == FOLDER == Path(__file__).parents[2] / "bench" / "results"


def test_spread_is_median_and_extremes() -> None:
    assert spread([3.0, 1.0, 10.004]) == {"median": 3.0, "min": 1.0, "max": 10.0}
