"""`siluette tune`, in process, on a tiny model: from text to an adapter that is served."""

import re
from dataclasses import fields
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from engine import LLM, Activation, DType, EngineConfig, PositiveBranch
from server import cli_tune
from server.cli import app
from server.cli_support import USAGE_ERROR
from tests.engine.models.tiny import make_tiny
from training.config import Method, Trained, TuneConfig
from training.schedule import parse_p

QUICK = {
    "--steps": "2",
    "--batch-size": "2",
    "--sequence-length": "16",
    "--lora-rank": "2",
    "--alpha": "0.5",
    "--eval-tokens": "16",
    "--threads": "1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tune")
    make_tiny("llama", path / "model")
    (path / "train.txt").write_text("the rain in the north. " * 30)
    (path / "manual.txt").write_text("the hat is on the stair. " * 10)
    return path


def tune(folder: Path, output: Path, *options: str) -> Result:
    """Run the command on the tiny model; options come last, so they override."""
    arguments = ["tune", "--model", str(folder / "model"), "--text", str(folder / "train.txt"), "-o", str(output)]
    return CliRunner().invoke(
        app, [*arguments, *chain(*QUICK.items()), *options], env={"COLUMNS": "200", "TERM": "dumb"}
    )


def test_end_to_end_and_once_more(folder: Path, tmp_path: Path) -> None:
    held_out = ("--held-out", str(folder / "manual.txt"))
    result = tune(folder, tmp_path / "out", *held_out)
    assert result.exit_code == 0, result.output
    assert re.search(r"│ manual +│( \d+\.\d\d → \d+\.\d\d +│){5}", result.output)
    assert str(tmp_path / "out" / "adapter_model.safetensors") in result.output
    assert "Going on" not in result.output

    again = tune(folder, tmp_path / "out", *held_out)
    assert again.exit_code == 0
    assert "Going on after step 2" in again.output
    assert re.findall(r"│ manual .*", again.output) == re.findall(r"│ manual .*", result.output)

    config = EngineConfig(
        model=str(folder / "model"),
        adapter=str(tmp_path / "out"),
        dtype=DType.FLOAT32,
        kv_cache_mib=8,
        threads=1,
    )
    with LLM(config=config) as llm:
        assert llm.info.support.tuned
        assert llm.info.quality.perplexity.keys() == {"manual"}
        assert len(llm.score("the rain", Activation("relu"))) == 1


def test_without_held_out_text_there_is_no_table(folder: Path, tmp_path: Path) -> None:
    result = tune(folder, tmp_path / "out", "--train", "ffn", "--method", "swi+ft", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "Perplexity" not in result.output
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_held_out_text_may_join_when_a_run_goes_on(folder: Path, tmp_path: Path) -> None:
    tune(folder, tmp_path / "out", "--held-out", str(folder / "manual.txt"), "--save-every", "1")
    newest = tmp_path / "out" / "state" / "step-00000002"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    both = ("--held-out", str(folder / "manual.txt"), "--held-out", str(folder / "train.txt"), "--save-every", "1")
    result = tune(folder, tmp_path / "out", *both)
    assert result.exit_code == 0, result.output
    assert "Going on after step 1" in result.output
    assert re.search(r"│ train +│ (\d+\.\d\d) → \1 ", result.output)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("-p", "1.5"), "p must be a number in [0, 1], 'START:END', or shares"),
            (("--alpha", "2"), "alpha must be in [0, 1], got 2.0"),
            (("--batch-size", "8", "--micro-batch-size", "3"), "micro_batch_size must be a divisor of batch_size (8)"),
            (("--from-scratch",), "trained must be 'all' for a model from scratch"),
            (("--text", "no-such-file.txt"), "no-such-file.txt"),
            (("--text", "train.txt:0"), "weight must be a finite number above 0, got 0"),
            (("--sequence-length", "5000"), "fewer than one sequence of 5000"),
            (("--model", "no/such/model/here"), "'no/such/model/here'"),
            pytest.param(
                ("--device", "cuda"),
                "device must be 'cpu'",
                marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device"),
            ),
        ],
    )
    def test_are_one_line(self, options: tuple[str, ...], message: str, folder: Path, tmp_path: Path) -> None:
        result = tune(folder, tmp_path / "out", *options)
        assert result.exit_code == USAGE_ERROR
        (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
        assert message in line
        assert "Traceback" not in result.output

    def test_a_folder_with_another_run_is_refused(self, folder: Path, tmp_path: Path) -> None:
        tune(folder, tmp_path / "out")
        result = tune(folder, tmp_path / "out", "--seed", "1")
        assert result.exit_code == USAGE_ERROR
        assert re.search(r"^Error: .*holds a run with other settings", result.output, re.MULTILINE)

    @pytest.mark.parametrize("options", [("--held-out", "no-such-file"), ("--method", "relu"), ("--train", "head")])
    def test_unknown_values_are_usage_errors(self, options: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
        result = tune(folder, tmp_path / "out", *options)
        assert result.exit_code == USAGE_ERROR
        assert options[0] in result.output


class TestOptions:
    @staticmethod
    def parameters() -> dict[str, Any]:
        group: Any = typer.main.get_command(app)
        return {parameter.name: parameter for parameter in group.commands["tune"].params}

    def test_defaults_are_those_of_the_code(self) -> None:
        options = self.parameters()
        named = {"trained": "train"}
        compared = 0
        for field in fields(TuneConfig):
            option = options.get(named.get(field.name, field.name))
            if option is None or field.name in ("output", "model"):
                continue
            if field.name in ("alpha", "distillation"):  # the command's depend on other options
                assert str(option.show_default).startswith(f"{field.default:g};")
                continue
            default = TuneConfig(output=Path()).p if field.name == "p" else field.default
            assert (parse_p(option.default) if field.name == "p" else option.default) == default, field.name
            compared += 1
        assert compared >= 20

    @pytest.mark.parametrize(
        ("option", "kind"), [("method", Method), ("train", Trained), ("positive_branch", PositiveBranch)]
    )
    def test_choices_are_those_of_the_code(self, option: str, kind: type[StrEnum]) -> None:
        choices = get_args(get_args(get_type_hints(cli_tune.tune, include_extras=True)[option])[0])
        assert set(choices) == {str(item) for item in kind}
