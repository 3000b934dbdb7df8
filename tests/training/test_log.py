import math
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from training.log import MEASUREMENTS_FILE, PLOT_FILE, STEPS_FILE, Measurement, RunLog, StepRecord

FIRST = StepRecord(
    step=1,
    tokens=256,
    loss=3.25,
    next_token=3.5,
    distillation=0.1 + 0.2,
    zeros=0.75,
    gradient_norm=1e-9,
    learning_rate=1e-05,
    seconds=1.2345678e-05,
)
RECORDS = [replace(FIRST, step=step, tokens=256 * step, loss=4 / step) for step in (1, 2, 3)]
MEASUREMENTS = [
    Measurement(step, {"manual": {"silu": 11.5 + step, "relu": 40.0}, "tale": {"silu": 9.0, "relu": 30.0}}, [0.5, 0.75])
    for step in (0, 2, 3)
]


def write(folder: Path) -> RunLog:
    log = RunLog(folder, 0)
    log.measurement(MEASUREMENTS[0])
    for record in RECORDS:
        log.step(record)
    for item in MEASUREMENTS[1:]:
        log.measurement(item)
    return log


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    write(tmp_path)
    again = RunLog(tmp_path, 3)
    assert again.steps == RECORDS
    assert again.measurements == MEASUREMENTS


def test_no_number_survives_as_no_number(tmp_path: Path) -> None:
    RunLog(tmp_path, 0).step(replace(FIRST, distillation=math.nan, zeros=math.nan))
    (record,) = RunLog(tmp_path, 1).steps
    assert math.isnan(record.distillation)
    assert math.isnan(record.zeros)
    assert record.loss == FIRST.loss


def test_what_came_after_the_saved_state_is_dropped_from_the_files_too(tmp_path: Path) -> None:
    write(tmp_path)
    again = RunLog(tmp_path, 2)
    assert again.steps == RECORDS[:2]
    assert again.measurements == MEASUREMENTS[:2]
    again.step(RECORDS[2])
    assert RunLog(tmp_path, 3).steps == RECORDS
    assert len((tmp_path / STEPS_FILE).read_text().splitlines()) == 1 + len(RECORDS)
    assert len((tmp_path / MEASUREMENTS_FILE).read_text().splitlines()) == 2


@pytest.mark.parametrize("name", [STEPS_FILE, MEASUREMENTS_FILE])
def test_a_last_line_cut_anywhere_costs_no_earlier_line(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    whole = {file: (tmp_path / file).read_bytes() for file in (STEPS_FILE, MEASUREMENTS_FILE)}
    last_line = len(whole[name].splitlines(keepends=True)[-1])
    for cut in range(1, last_line + 1):
        for file, content in whole.items():
            (tmp_path / file).write_bytes(content[:-cut] if file == name else content)
        again = RunLog(tmp_path, 2)
        assert again.steps == RECORDS[:2]
        assert again.measurements == MEASUREMENTS[:2]


def test_a_kill_while_the_files_are_written_anew_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            RunLog(tmp_path, 3)
    assert RunLog(tmp_path, 3).steps == RECORDS


@pytest.mark.parametrize("measured", [True, False])
def test_the_picture_is_drawn_with_and_without_measurements(measured: bool, tmp_path: Path) -> None:
    log = write(tmp_path)
    if not measured:
        log.measurements.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.plot()
    root = ElementTree.parse(tmp_path / PLOT_FILE).getroot()
    groups = [element.get("id") or "" for element in root.iter()]
    assert sum(name.startswith("axes_") for name in groups) == 3
    assert any(name.startswith("legend") for name in groups) is measured  # names the activations' curves
