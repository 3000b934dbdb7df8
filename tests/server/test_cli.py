"""The command line, in process; the model behind it is a tiny random one."""

import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner, Result

from engine import (
    Activation,
    ActivationMode,
    Device,
    DType,
    EngineConfig,
    FfnPath,
    KernelSet,
    Quantization,
    SamplingParams,
    Scope,
)
from server import cli_options as opt
from server.cli import app
from server.loadgen_workload import MODES
from server.settings import LogLevel, ServerSettings
from server.version import VERSION
from tests.engine.models.tiny import make_tiny

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin, env={"COLUMNS": "200", "TERM": "dumb"})


def options_of(command: str) -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return {parameter.name: parameter for parameter in group.commands[command].params}


class TestHelp:
    def test_importing_the_command_line_does_not_load_torch(self) -> None:
        code = "import sys, server.cli; sys.exit('torch' in sys.modules or 'engine' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    @pytest.mark.parametrize("command", ["serve", "generate", "info", "bench"])
    def test_each_command_has_help(self, command: str) -> None:
        result = run(command, "--help")
        assert result.exit_code == 0
        assert f"{command} [OPTIONS]" in result.output

    def test_version(self) -> None:
        result = run("--version")
        assert result.exit_code == 0
        assert result.output == f"siluette {VERSION}\n"

    def test_serve_has_an_option_for_every_setting(self) -> None:
        settings = {field.name for field in fields(EngineConfig)} | set(ServerSettings.model_fields)
        assert settings <= set(options_of("serve"))

    @pytest.mark.parametrize(
        ("command", "defaults"),
        [
            ("serve", {field.name: field.default for field in fields(EngineConfig)}),
            ("serve", {name: field.default for name, field in ServerSettings.model_fields.items()}),
            ("generate", {field.name: field.default for field in fields(EngineConfig)}),
            ("generate", {field.name: field.default for field in fields(SamplingParams)}),
            (
                "generate",
                {"mode": Activation().mode, "p": Activation(ActivationMode.STOCHASTIC).p, "scope": Activation().scope},
            ),
            ("info", {field.name: field.default for field in fields(EngineConfig)}),
        ],
    )
    def test_defaults_in_the_help_are_those_of_the_code(self, command: str, defaults: dict[str, object]) -> None:
        options = options_of(command)
        compared = 0
        for name, default in defaults.items():
            if name in options and default not in (None, MISSING, False, (), []):  # those are in words or not shown
                assert options[name].show_default == (name.replace("_", "-") if default is True else str(default))
                compared += 1
        assert compared >= 3

    @pytest.mark.parametrize(
        ("names", "kind"),
        [
            (get_args(opt.DTypeName), DType),
            (get_args(opt.QuantizationName), Quantization),
            (get_args(opt.FfnPathName), FfnPath),
            (get_args(opt.KernelsName), KernelSet),
            (get_args(opt.DeviceName), Device),
            (get_args(opt.ModeName), ActivationMode),
            (get_args(opt.ScopeName), Scope),
            (get_args(opt.LogLevelName), get_args(LogLevel)),
            (MODES, ActivationMode),
        ],
    )
    def test_choices_are_those_of_the_code(self, names: tuple[str, ...], kind: Any) -> None:
        assert names == tuple(kind)


class TestBadValues:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("generate", "x", "--mode", "gelu"), "'gelu' is not one of 'silu', 'stochastic', 'relu'"),
            (
                ("generate", "x", "--mode", "stochastic", "-p", "1.5"),
                "activation.p must be a number in [0, 1], got 1.5",
            ),
            (("generate", "x", "-p", "0.8"), "activation.p has a meaning in mode 'stochastic' only"),
            (("generate", "x", "--activation-seed", "1"), "activation.seed has a meaning in mode 'stochastic' only"),
            (("generate", "x", "--temperature", "nan"), "temperature must be a number in [0, 10], got nan"),
            (("generate", "x", "-n", "0"), "n must be an integer in [1, 128], got 0"),
            (("generate", "x", "--no-chat", "--system", "y"), "a system message needs a chat"),
            (("generate", "x", "--model", "./no-such-model"), "no-such-model"),
            (("info", "./no-such-model"), "no-such-model"),
            (("serve", "./no-such-model", "--port", "0"), "no-such-model"),
            (("serve", "--port", "70000"), "less than or equal to 65535"),
            (("serve", "--shutdown-timeout", "inf"), "shutdown_timeout: Input should be a finite number"),
            (("serve", "--drain-delay", "inf"), "drain_delay: Input should be a finite number"),
            (("serve", "--dtype", "int8"), "'int8' is not one of 'auto', 'float32', 'bfloat16'"),
            (("serve", "--quantize", "int2"), "'int2' is not one of 'none', 'int8', 'int4'"),
            (
                ("generate", "x", "--quantize", "int8", "--kernels", "reference"),
                "quantize must be 'none' with the reference kernels, got 'int8'",
            ),
            (("info", "--perplexity", "no-such-text"), "no-such-text"),
            (("bench", "--mode-mix", "gelu=1"), "a mode mix names each of silu, stochastic, relu at most once"),
            (("bench", "--prompt-tokens", "12-14"), "a length must be a number of tokens such as '128' or '128+-64'"),
            (("bench", "--base-url", "ftp://x"), "the base URL must look like 'http://127.0.0.1:8000'"),
            (("bench", "--request-rate", "0"), "the request rate must be above 0"),
            (("bench", "--shared-prefix-tokens", "128"), "the shared prefix must be shorter than the shortest prompt"),
            (("bench", "-p", "0.8"), "p needs stochastic requests"),
            (("bench", "--scope", "decode"), "scope needs stochastic or relu requests"),
            (("bench", "--json", "no/such/folder/x.json"), "there is no folder no/such/folder"),
            (("bench", "--base-url", "http://127.0.0.1:1"), "cannot connect to 127.0.0.1:1"),
        ],
    )
    def test_is_named_in_one_message_and_exit_status_2(self, arguments: tuple[str, ...], message: str) -> None:
        result = run(*arguments)
        assert result.exit_code == 2
        assert message in unboxed(result.output)
        assert "Traceback" not in result.output

    def test_bad_environment_names_the_setting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SILUETTE_MAX_PROMPTS", "many")
        result = run("serve")
        assert result.exit_code == 2
        assert "max_prompts: Input should be a valid integer" in unboxed(result.output)


def unboxed(output: str) -> str:
    """Output without the frame that typer draws, each run of white space as one space."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", ANSI.sub("", output)).split())


@pytest.fixture
def options(tiny_model: Path) -> tuple[str, ...]:
    return ("--model", str(tiny_model), "--dtype", "float32", "--kv-cache-mib", "4", "--threads", "1")


class TestGenerate:
    ARGUMENTS = ("generate", "hello", "--no-chat", "--max-tokens", "8", "--ignore-eos", "--seed", "1")

    def test_one_sample_goes_to_standard_output_and_figures_to_standard_error(self, options: tuple[str, ...]) -> None:
        first, second = run(*self.ARGUMENTS, *options), run(*self.ARGUMENTS, *options)
        assert first.exit_code == 0, first.output
        assert first.stdout.strip()
        assert first.stdout == second.stdout
        assert "activation silu; seed 1" in first.stderr
        assert "8 tokens in" in first.stderr
        assert "zeros in the feed-forward: silu " in first.stderr

    def test_several_samples_have_headers_where_there_is_no_terminal(self, options: tuple[str, ...]) -> None:
        result = run(*self.ARGUMENTS, "-n", "3", "--mode", "stochastic", "-p", "0.8", *options)
        assert result.exit_code == 0, result.output
        headers = re.findall(r"^=== sample (\d) \(8 tokens, length\) ===$", result.stdout, re.MULTILINE)
        assert headers == ["0", "1", "2"]
        assert "activation stochastic, p 0.8, activation seed 1, scope all; seed 1" in result.stderr

    def test_prompt_from_standard_input_is_the_same_prompt(self, options: tuple[str, ...]) -> None:
        piped = run("generate", "-", *self.ARGUMENTS[2:], *options, stdin="hello")
        assert piped.stdout == run(*self.ARGUMENTS, *options).stdout

    def test_untuned_mode_is_refused_with_a_hint_and_allowed_on_demand(self, options: tuple[str, ...]) -> None:
        refused = run(*self.ARGUMENTS, "--mode", "relu", *options)
        assert refused.exit_code == 2
        assert "--allow-untuned-activations" in refused.stderr
        allowed = run(*self.ARGUMENTS, "--mode", "relu", "--allow-untuned-activations", *options)
        assert allowed.exit_code == 0
        assert re.search(r"zeros in the feed-forward: relu [1-9]", allowed.stderr)

    def test_too_long_a_prompt_is_one_line(self, options: tuple[str, ...]) -> None:
        result = run("generate", "-", "--no-chat", *options, stdin="hello " * 1000)
        assert result.exit_code == 2
        assert re.search(r"^Error: .*context", result.stderr, re.MULTILINE)


class TestInfo:
    def test_shows_model_modes_and_memory(self, tiny_model: Path) -> None:
        result = run("info", str(tiny_model), "--dtype", "float32", "--kv-cache-mib", "4", "--threads", "1")
        assert result.exit_code == 0, result.output
        text = " ".join(result.stdout.split())
        assert "architecture LlamaForCausalLM" in text
        assert "context 256 tokens" in text
        assert "dtype float32" in text
        assert "modes 'silu', 'stochastic' with p in [0.7, 1] (not tuned" in text
        assert re.search(r"KV cache \d\.\d MiB, \d+ blocks of \d+ tokens", text)
        assert re.search(r"attention kernels \w+", text)

    @pytest.mark.parametrize("quantize", Quantization)
    def test_names_the_quantisation_and_measures_perplexity_in_the_modes_that_are_allowed(
        self, tiny_model: Path, quantize: str, tmp_path: Path
    ) -> None:
        text = tmp_path / "hats.txt"
        text.write_text("the hat is near the tree. " * 20)
        options = ("--dtype", "float32", "--kv-cache-mib", "4", "--threads", "1", "--max-tokens", "300")
        result = run("info", str(tiny_model), "--quantize", quantize, "--perplexity", str(text), *options)

        assert result.exit_code == 0, result.output
        assert (f"quantised {quantize}" in " ".join(result.stdout.split())) is (quantize != Quantization.NONE)
        # An untuned model tolerates no p of 0.5, nor RELU.
        (row,) = re.findall(r"^hats\.txt +(\S+) +300 +1 +[\d.]+ +([\d.]+)", result.stdout, re.MULTILINE)
        assert row[0] == "silu"
        assert float(row[1]) > 1

    def test_widths_that_cannot_be_quantised_are_one_line(self, tmp_path: Path) -> None:
        make_tiny("llama", tmp_path, intermediate_size=160)
        result = run("info", str(tmp_path), "--quantize", "int4", "--kv-cache-mib", "4")
        assert result.exit_code == 2
        assert re.search(r"^Error: intermediate_size 160 is no multiple of 64", result.stderr, re.MULTILINE)

    def test_a_text_without_words_is_one_line(self, tiny_model: Path, tmp_path: Path) -> None:
        text = tmp_path / "empty.txt"
        text.write_text("")
        result = run("info", str(tiny_model), "--perplexity", str(text), "--kv-cache-mib", "4")
        assert result.exit_code == 2
        assert re.search(r"^Error: .*empty\.txt holds no text", result.stderr, re.MULTILINE)


@pytest.mark.slow
def test_module_can_be_run() -> None:
    result = subprocess.run([sys.executable, "-m", "server.cli", "info"], capture_output=True, text=True, check=True)
    assert "SmolLM2-135M-Instruct" in result.stdout
