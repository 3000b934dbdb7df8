"""Both sides of the benchmark compute the same, and what it reports of them."""

import json
from pathlib import Path

import numpy as np

from bench.turns import in_regions, in_turns, main
from engine.kernels.cpu.team import make_progress


def test_both_sides_compute_the_same() -> None:
    values = [np.ones((2, 16), np.int64) for _ in range(2)]

    in_regions(3, 7, values[0], 5, make_progress(2))
    in_turns(3, 7, values[1], 5, make_progress(2))

    np.testing.assert_array_equal(*values)
    assert (values[0][:, 0] != 1).all()


def test_results_name_the_share_that_python_was_busy(tmp_path: Path) -> None:
    main(
        ["--parts", "2", "--steps", "10", "--busy", "0", "0.5", "--rounds", "2", "--times", "2", "--out", str(tmp_path)]
    )

    (file,) = tmp_path.iterdir()
    document = json.loads(file.read_text())
    assert [result["python_busy"] for result in document["results"]] == [0, 0.5]
    assert all({"regions_ms", "turns_ms", "speedup"} <= result.keys() for result in document["results"])
    assert document["settings"]["threads"] >= 1
