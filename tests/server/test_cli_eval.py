"""`siluette eval` in process, on a tiny random model."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from engine import ActivationMode, EngineConfig
from evaluation import best_of_n
from evaluation.best_of_n import ControlResult
from evaluation.controls import PROBABILITIES, TEMPERATURES, Control, default_controls
from evaluation.grid import DEFAULT_GRID, describe
from server.cli import app
from tests.engine.models.tiny import make_tiny

pytest.importorskip("sacrebleu")

UNTUNED = "--allow-untuned-activations"
FRAME = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[│╭╮╰╯─]")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["eval", *arguments], env={"COLUMNS": "240", "TERM": "dumb"})


def ok(*arguments: str) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def rows(result: Result) -> list[list[str]]:
    """The printed table's rows, its columns being two spaces apart."""
    return [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()[1:] if line.strip(" ─")]


@pytest.fixture
def options(tiny_model: Path) -> tuple[str, ...]:
    return ("--model", str(tiny_model), "--dtype", "float32", "--kv-cache-mib", "4", "--threads", "1")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "hats.txt"
    path.write_text("the hat is near the tree. " * 20)
    return str(path)


@pytest.fixture
def quiz(tmp_path: Path) -> str:
    path = tmp_path / "quiz.jsonl"
    lines = [{"question": f"What is {i}?", "answers": ["b", "e"]} for i in range(5)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("the hat\n\nthe tree\n")
    return str(path)


class TestPerplexity:
    def test_an_untuned_model_is_measured_with_what_it_allows(self, options: tuple[str, ...], text: str) -> None:
        found = rows(ok("perplexity", text, *options))

        assert [row[:2] for row in found] == [
            ["hats.txt", name] for name in ("silu", "stochastic:0.9", "stochastic:0.7")
        ]
        assert found[0][-2:] == ["-", "-"]
        assert [float(row[-2]) for row in found[1:]] == pytest.approx(
            [float(row[5]) / float(found[0][5]) for row in found[1:]], rel=1e-2
        )

    def test_on_demand_all_of_the_grid(self, options: tuple[str, ...], text: str) -> None:
        found = rows(ok("perplexity", text, UNTUNED, *options))
        assert [row[1] for row in found] == [describe(activation) for activation in DEFAULT_GRID]

    def test_what_is_asked_for_by_name_is_measured_or_refused(self, options: tuple[str, ...], text: str) -> None:
        asked = ("perplexity", text, "--activation", "relu", "--activation", "silu", *options)
        assert [row[1] for row in rows(ok(*asked, UNTUNED))] == ["relu", "silu"]
        refused = run(*asked)
        assert refused.exit_code == 2
        assert re.search(r"^Error: .*'relu'.*--allow-untuned-activations", refused.stderr, re.MULTILINE)

    def test_json_and_table_tell_the_same(self, options: tuple[str, ...], text: str, tmp_path: Path) -> None:
        path = tmp_path / "out.json"
        result = ok(
            "perplexity",
            text,
            text,
            "--max-tokens",
            "60",
            "--context",
            "32",
            "--seeds",
            "2",
            "--json",
            str(path),
            *options,
        )

        document: dict[str, Any] = json.loads(path.read_text())
        assert document["evaluation"] == "perplexity"
        assert document["settings"] == {"context": 32, "max_tokens": 60, "seeds": 2, "seed": 0}
        assert document["model"]["dtype"] == "float32"
        assert document["model"]["quantization"] == "none"
        assert document["machine"]["python"]
        assert str(tmp_path) not in path.read_text()
        assert [record["passes"] for record in document["results"]] == [1, 2, 2] * 2
        assert [f"{record['nll']:.4f}" for record in document["results"]] == [row[4] for row in rows(result)]
        assert {record["tokens"] for record in document["results"]} == {60}

    def test_plot(self, options: tuple[str, ...], text: str, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        path = tmp_path / "plot.svg"
        ok("perplexity", text, "--plot", str(path), *options)
        assert "hats.txt" in path.read_text()

    def test_windows_are_as_long_as_a_short_context_allows(self, options: tuple[str, ...], text: str) -> None:
        (row, *_) = rows(ok("perplexity", text, "--activation", "silu", *options))
        assert row[6] != "-"  # 460 tokens in a context of 256: two windows, so there is an error


class TestSparsity:
    def test_a_row_for_each_layer_and_the_mean(self, options: tuple[str, ...], text: str, tmp_path: Path) -> None:
        path = tmp_path / "out.json"
        found = rows(ok("sparsity", text, UNTUNED, "--json", str(path), *options))

        (record,) = json.loads(path.read_text())["results"]
        assert [row[0] for row in found] == ["0", "1", "2", "mean"]
        assert [row[1] for row in found] == [f"{share:.1%}" for share in (*record["zeros"], record["mean"])]
        assert all(0.2 < share < 0.8 for share in record["zeros"])

    def test_plot(self, options: tuple[str, ...], text: str, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        path = tmp_path / "plot.png"
        ok("sparsity", text, UNTUNED, "--plot", str(path), *options)
        assert path.read_bytes().startswith(b"\x89PNG")


class TestQuestions:
    def test_default_controls_are_those_that_the_model_allows(self, options: tuple[str, ...], quiz: str) -> None:
        allowed = rows(ok("questions", quiz, "--samples", "2", "--limit", "2", *options))
        everything = rows(ok("questions", quiz, "--samples", "2", "--limit", "2", UNTUNED, *options))

        labels = [control.label for control in default_controls()]
        assert [row[0] for row in everything] == labels
        assert [row[0] for row in allowed] == [
            label for label in labels if not label.startswith(("RELU", "stochastic 0.5", "stochastic 0.3"))
        ]

    def test_controls_samples_and_questions_can_be_chosen(
        self, options: tuple[str, ...], quiz: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "out.json"
        chosen = ("--temperature", "0.8", "-p", "0.75", "--samples", "4", "--limit", "3", "--with-texts")
        ok("questions", quiz, *chosen, "--json", str(path), *options)

        results = json.loads(path.read_text())["results"]
        settings = [
            tuple(result["control"][key] for key in ("mode", "p", "temperature", "scope")) for result in results
        ]
        assert settings == [
            ("silu", None, 0.8, "all"),
            ("stochastic", 0.75, 0.0, "all"),
            ("stochastic", 0.75, 0.7, "all"),
            ("stochastic", 0.75, 0.0, "decode"),
            ("stochastic", 0.75, 0.7, "decode"),
        ]
        assert [entry["n"] for entry in results[0]["best_of"]] == [1, 2, 4]
        assert [len(texts) for texts in results[0]["answers"]] == [4, 4, 4]

    def test_a_run_that_is_stopped_keeps_what_it_has(
        self, options: tuple[str, ...], quiz: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, score = tmp_path / "out.json", best_of_n.score_control

        def stop_at_the_third(control: Control, *rest: Any) -> ControlResult:
            if control.activation.mode is not ActivationMode.SILU:
                raise KeyboardInterrupt
            return score(control, *rest)

        monkeypatch.setattr(best_of_n, "score_control", stop_at_the_third)
        chosen = ("--temperature", "0.8", "--temperature", "1.2", "-p", "0.75", "--samples", "2", "--limit", "2")
        result = run("questions", quiz, *chosen, "--json", str(path), *options)

        assert result.exit_code != 0
        document = json.loads(path.read_text())
        assert [found["control"]["temperature"] for found in document["results"]] == [0.8, 1.2]
        assert document["settings"]["controls"] == 6

    def test_a_model_without_a_chat_template_gets_examples(self, quiz: str, tmp_path: Path) -> None:
        make_tiny("llama", tmp_path / "model")
        for file in (tmp_path / "model").glob("chat_template*"):
            file.unlink()
        config = tmp_path / "model" / "tokenizer_config.json"
        settings = json.loads(config.read_text())
        settings.pop("chat_template", None)
        config.write_text(json.dumps(settings))
        path = tmp_path / "out.json"

        ok(
            *("questions", quiz, "--samples", "1", "--temperature", "1.0", "-p", "0.8", "--json", str(path)),
            *("--model", str(tmp_path / "model"), "--kv-cache-mib", "4", "--threads", "1"),
        )

        assert json.loads(path.read_text())["settings"]["questions"] == 2


class TestDiversity:
    def test_a_row_for_each_control(self, options: tuple[str, ...], prompts: str, tmp_path: Path) -> None:
        path = tmp_path / "out.json"
        chosen = ("--temperature", "0.8", "-p", "0.75", "--samples", "3", "--max-tokens", "6", "--no-chat")
        found = rows(ok("diversity", prompts, *chosen, "--with-texts", "--json", str(path), *options))

        document = json.loads(path.read_text())
        assert document["settings"] == {"prompts": 2, "samples": 3, "max_tokens": 6, "seed": 0}
        assert [row[0] for row in found] == [result["control"]["label"] for result in document["results"]]
        assert [len(texts) for texts in document["results"][0]["texts"]] == [3, 3]

    def test_no_prompts(self, options: tuple[str, ...], tmp_path: Path) -> None:
        (tmp_path / "empty.txt").write_text("\n")
        result = run("diversity", str(tmp_path / "empty.txt"), *options)
        assert result.exit_code == 2
        assert re.search(r"^Error: .*empty.txt holds no prompts$", result.stderr, re.MULTILINE)


class TestBadValues:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--activation", "gelu"), "an activation must be 'silu', 'relu' or 'stochastic:P'"),
            (("--context", "257"), "context must be in [2, 256], the model's context, got 257"),
            (("--json", "no/such/folder/x.json"), "there is no folder no/such/folder"),
            (("--plot", "no/such/folder/x.svg"), "there is no folder no/such/folder"),
            (("--plot", "x.gif"), "a plot's file must end in .svg or .png, got 'x.gif'"),
            (("--seeds", "0"), "Input should be greater than or equal to 1"),
        ],
    )
    def test_are_named_in_one_message_and_exit_status_2(
        self, options: tuple[str, ...], text: str, arguments: tuple[str, ...], message: str
    ) -> None:
        result = run("perplexity", text, *arguments, *options)
        assert result.exit_code == 2
        assert message in " ".join(FRAME.sub(" ", result.output).split())

    def test_a_bad_line_of_a_text_is_named(self, options: tuple[str, ...], tmp_path: Path) -> None:
        (tmp_path / "x.jsonl").write_text("{}")
        result = run("perplexity", str(tmp_path / "x.jsonl"), *options)
        assert result.exit_code == 2
        assert re.search(r"^Error: .*x.jsonl:1: must be an object", result.stderr, re.MULTILINE)


class TestHelp:
    @pytest.mark.parametrize("command", ["perplexity", "sparsity", "questions", "diversity"])
    def test_each_command_has_help(self, command: str) -> None:
        assert f"eval {command} [OPTIONS]" in ok(command, "--help").output

    def test_defaults_in_the_help_are_those_of_the_code(self) -> None:
        help_of = {
            name: " ".join(FRAME.sub(" ", ok(name, "--help").output).split()) for name in ("perplexity", "questions")
        }
        shares = ", ".join(f"{activation.p:g}" for activation in DEFAULT_GRID if activation.p is not None)
        assert f"silu, stochastic with p {shares}, and relu" in help_of["perplexity"]
        assert ", ".join(map(str, TEMPERATURES)) in help_of["questions"]
        assert ", ".join(map(str, PROBABILITIES)) in help_of["questions"]
        assert f"[default: ({EngineConfig().max_num_seqs})]" in help_of["questions"]
