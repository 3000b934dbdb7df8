"""The script that checks everything that only a GPU can show: which checks, and what it says without one."""

import json
import sys
from pathlib import Path

import pytest
import torch

from scripts.check_gpu import SANITIZER_TOOLS, Check, checks, main, run


def test_tests_come_first_and_the_sanitizer_runs_where_it_is_installed(tmp_path: Path) -> None:
    without, sanitized = checks(tmp_path, None), checks(tmp_path, "/usr/bin/compute-sanitizer")

    assert [check.name for check in without] == ["tests", "ffn_gpu", "decode_gpu"]
    assert [check.name for check in sanitized[3:]] == list(SANITIZER_TOOLS)
    assert sanitized[3].command[:3] == ("/usr/bin/compute-sanitizer", "--tool", "memcheck")
    assert str(tmp_path) in without[1].command


def test_output_and_status_of_a_check_are_kept(tmp_path: Path) -> None:
    good, bad = (
        run(Check(name, (sys.executable, "-c", f"print('{name}'); raise SystemExit({status})")), tmp_path)
        for name, status in (("fine", 0), ("broken", 3))
    )

    assert (good.status, bad.status) == (0, 3)
    assert (tmp_path / "broken.log").read_text() == "broken\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "new")])

    assert "device 'cuda' needs" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_unknown_check_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--only", "speed"])

    assert "no check speed; there are tests, ffn_gpu, decode_gpu" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_a_summary_names_the_device(tmp_path: Path) -> None:
    main([str(tmp_path), "--only", "decode_gpu"])

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["device"] == torch.cuda.get_device_name()
