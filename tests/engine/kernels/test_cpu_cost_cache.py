"""Measured costs on disk."""

import json
from pathlib import Path

import pytest

from engine.ffn_router import MEASURED_ROWS, FfnCosts
from engine.kernels.cpu.cost_cache import cached_costs


class Measurement:
    """Gives other costs each time."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> FfnCosts:
        self.count += 1
        return FfnCosts(*((self.count + side / 4,) * len(MEASURED_ROWS) for side in range(3)))


def test_are_measured_once(tmp_path: Path) -> None:
    measure = Measurement()
    folder = tmp_path / "not" / "there yet"

    first = cached_costs("a model", measure, folder)

    assert cached_costs("a model", measure, folder) == first
    assert measure.count == 1
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_belong_to_their_subject(tmp_path: Path) -> None:
    measure = Measurement()

    assert cached_costs("a model", measure, tmp_path) != cached_costs("another model", measure, tmp_path)
    assert measure.count == 2


ROWS = [1.0] * len(MEASURED_ROWS)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        json.dumps({"dense": ROWS, "sparse_low": ROWS}),
        json.dumps({"dense": ROWS, "sparse_low": ROWS, "sparse_high": ROWS[1:]}),
        json.dumps({"dense": ROWS, "sparse_low": ROWS, "sparse_high": ["a"] * len(ROWS)}),
        json.dumps({"dense": ROWS, "sparse_low": ROWS, "sparse_high": 1}),
        json.dumps({"dense": ROWS, "sparse_low": ROWS, "sparse_high": ROWS, "more": ROWS}),
    ],
)
def test_a_broken_file_is_replaced(content: str, tmp_path: Path) -> None:
    measure = Measurement()
    cached_costs("a model", measure, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(content)

    again = cached_costs("a model", measure, tmp_path)

    assert measure.count == 2
    assert cached_costs("a model", measure, tmp_path) == again


def test_a_folder_that_cannot_be_written_costs_no_more_than_the_time(tmp_path: Path) -> None:
    measure = Measurement()
    (tmp_path / "file").touch()

    assert cached_costs("a model", measure, tmp_path / "file") == FfnCosts(
        *(((1 + side / 4,) * len(MEASURED_ROWS)) for side in range(3))
    )
    cached_costs("a model", measure, tmp_path / "file")
    assert measure.count == 2
