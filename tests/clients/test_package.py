"""The distribution `siluette-client`: what is in it, what it needs, and that nothing of it is in the server's."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import siluette_client
from tests.e2e.conftest import REPOSITORY

CLIENT = REPOSITORY / "clients" / "python"
PACKAGE = CLIENT / "src" / "siluette_client"
PROJECT: dict[str, Any] = tomllib.loads((CLIENT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = REPOSITORY / "constraints.txt"
CACHES = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")


def imported_packages(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text()))
    names = set()
    for node in tree:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names)


def test_needs_httpx_and_pydantic_only() -> None:
    requirements = [Requirement(text) for text in PROJECT["dependencies"]]
    modules = list(PACKAGE.glob("*.py"))

    assert {requirement.name for requirement in requirements} == {"httpx", "pydantic"}
    assert "optional-dependencies" not in PROJECT
    assert {path.name for path in modules} >= {"client.py", "async_client.py"}
    for path in modules:
        assert imported_packages(path) <= {"httpx", "pydantic", "siluette_client"}, path.name


def test_requirements_are_pinned_within_their_range() -> None:
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line)
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        assert pins[requirement.name] in requirement.specifier


def test_version_is_written_once() -> None:
    assert siluette_client.__version__ == PROJECT["version"]


def test_public_names_exist_and_have_docstrings() -> None:
    for name in siluette_client.__all__:
        value = getattr(siluette_client, name)
        assert not isinstance(value, type) or value.__doc__, name


def test_the_readme_names_every_error_and_setting() -> None:
    readme = (CLIENT / "README.md").read_text()
    names = [name for name in siluette_client.__all__ if is_error(name)] + ["base_url", "api_key", "retry", "limits"]

    assert len(names) > 10
    assert [name for name in names if f"`{name}`" not in readme] == []


def is_error(name: str) -> bool:
    value = getattr(siluette_client, name)
    return isinstance(value, type) and issubclass(value, siluette_client.APIError | siluette_client.TransportError)


def build(source: Path, target: Path, *names: str) -> Path:
    """A wheel of a copy of the source tree, so that the tree stays as it is."""
    copy = target / "source"
    copy.mkdir(parents=True)
    for name in names:
        path = source / name
        if path.is_dir():
            shutil.copytree(path, copy / name, ignore=CACHES)
        else:
            shutil.copy(path, copy / name)
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target, copy)
    (wheel,) = target.glob("*.whl")
    return wheel


def pip(python: str | Path, command: str, *arguments: str | Path) -> None:
    line = [python, "-m", "pip", "--disable-pip-version-check", command, "-q", *arguments]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_wheel_holds_its_package_and_works_alone(tmp_path: Path) -> None:
    wheel = build(CLIENT, tmp_path, "pyproject.toml", "README.md", "LICENSE", "src")
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.split("/")[0] for name in names}
    assert roots == {"siluette_client", f"siluette_client-{PROJECT['version']}.dist-info"}
    assert "siluette_client/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip(python, "install", "--constraint", CONSTRAINTS, wheel)
    program = "import siluette_client, importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    listed = subprocess.run([python, "-I", "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    installed = {canonicalize_name(name) for name in listed.stdout.split()} - {"pip", "setuptools"}
    assert installed == closure("siluette-client")
    assert not installed & {"torch", "fastapi", "siluette"}


def closure(name: str) -> set[str]:
    """A distribution and all that it needs, by the metadata of what is installed here."""
    found: set[str] = set()
    pending = [canonicalize_name(name)]
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            needed = [Requirement(text) for text in requires(name) or []]
            applying = [item for item in needed if item.marker is None or item.marker.evaluate({"extra": ""})]
            pending += [canonicalize_name(item.name) for item in applying]
    return found


@pytest.mark.slow
def test_the_servers_distributions_hold_nothing_of_the_clients(tmp_path: Path) -> None:
    names = ("pyproject.toml", "README.md", "LICENSE", "engine", "server", "training", "evaluation", "clients")
    wheel = build(REPOSITORY, tmp_path, *names)
    program = "import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])"
    command = [sys.executable, "-c", program, tmp_path]
    subprocess.run(command, cwd=tmp_path / "source", check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")

    with tarfile.open(sdist) as archive:
        files = zipfile.ZipFile(wheel).namelist() + archive.getnames()
    assert any(name.endswith("server/app.py") for name in files)
    assert [name for name in files if re.search(r"clients?/|siluette_client", name)] == []
