"""The Dockerfiles and the compose stack as files: linted, valid by schema, in agreement with the project."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.rehearse_image import Stage, image_of, read_stages
from server.serve import SLOW_CLIENT_SECONDS
from server.settings import ServerSettings

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
COMPOSE = ROOT / "docker" / "compose.yaml"


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.stem)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture
def image(dockerfile: Path) -> Stage:
    return image_of(dockerfile, Path("unused"))


@pytest.fixture(scope="module")
def stack() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


class TestDockerfiles:
    def test_hadolint_finds_nothing(self, dockerfile: Path) -> None:
        hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
        run = subprocess.run([hadolint, dockerfile], capture_output=True, text=True, check=False)
        assert (run.returncode, run.stdout) == (0, "")

    def test_every_base_is_pinned_to_a_version(self, dockerfile: Path) -> None:
        stages = read_stages(dockerfile, {})
        names = {str(stage.root) for stage, _ in stages}
        bases = [stage.base for stage, _ in stages if stage.base not in names]
        assert bases
        assert all(re.fullmatch(r"[\w/.-]+:\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", base) for base in bases)

    def test_versions_of_packages_stand_in_constraints_only(self, dockerfile: Path) -> None:
        assert re.findall(r"\w==\d", dockerfile.read_text()) == []

    def test_it_copies_what_the_ignore_file_lets_in_and_what_exists(self, dockerfile: Path) -> None:
        allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
        copied: set[str] = set()
        for _, instructions in read_stages(dockerfile, {}):
            for name, value in instructions:
                if name == "COPY" and "--from" not in value:
                    copied |= set(value.split()[:-1])
        assert copied == allowed
        assert all((ROOT / name).exists() for name in copied)


class TestImages:
    def test_the_user_is_a_number_and_not_root(self, image: Stage) -> None:
        assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", image.user)  # a name tells Kubernetes' runAsNonRoot nothing

    def test_what_is_written_lies_on_volumes(self, image: Stage) -> None:
        assert image.volumes == ["/cache", "/models"]
        for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME"):
            assert image.environment[name] in image.volumes

    def test_it_listens_beyond_the_container_and_is_probed_there(self, image: Stage) -> None:
        values = {
            name.removeprefix("SILUETTE_").lower(): value
            for name, value in image.environment.items()
            if name.startswith("SILUETTE_")
        }
        assert ServerSettings(**values).host == "0.0.0.0"
        assert ServerSettings(**values).port == 8000
        assert "/health/live" in image.healthcheck[-1]

    def test_arguments_of_docker_run_are_those_of_siluette(self, image: Stage) -> None:
        assert image.entrypoint == ["siluette"]
        assert image.command[0] == "serve"


class TestComposeStack:
    def test_is_valid_by_the_schema_of_the_compose_specification(self) -> None:
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout

    def test_images_are_pinned_or_built_here(self, stack: dict[str, Any]) -> None:
        for service in stack["services"].values():
            assert "build" in service or re.search(r":v?\d+\.\d+\.\d+$", service["image"])
        build = stack["services"]["siluette"]["build"]
        assert (COMPOSE.parent / build["context"] / build["dockerfile"]).resolve() in DOCKERFILES

    def test_no_port_is_open_to_other_machines(self, stack: dict[str, Any]) -> None:
        ports = [port for service in stack["services"].values() for port in service["ports"]]
        assert len(ports) == 3
        assert all(port.startswith("127.0.0.1:") for port in ports)

    def test_the_server_is_confined_and_its_volumes_are_those_of_the_image(self, stack: dict[str, Any]) -> None:
        service = stack["services"]["siluette"]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        targets = [volume.split(":")[1] for volume in service["volumes"]]
        assert targets == image_of(ROOT / "docker" / "cpu.Dockerfile", Path("unused")).volumes

    def test_it_has_time_to_drain(self, stack: dict[str, Any]) -> None:
        service = stack["services"]["siluette"]
        grace = float(service["stop_grace_period"].removesuffix("s"))
        assert grace > float(service["environment"]["SILUETTE_SHUTDOWN_TIMEOUT"]) + SLOW_CLIENT_SECONDS

    def test_what_it_mounts_from_the_project_exists(self, stack: dict[str, Any]) -> None:
        volumes = [volume for service in stack["services"].values() for volume in service["volumes"]]
        sources = [volume.split(":")[0] for volume in volumes if volume.startswith("../")]
        assert len(sources) == 4
        for source in sources:
            assert (COMPOSE.parent / source).exists(), source


class TestRehearsal:
    """What the rehearsal makes of a Dockerfile."""

    def test_stages_arguments_and_environment(self, tmp_path: Path) -> None:
        dockerfile = tmp_path / "Dockerfile"
        dockerfile.write_text(
            "ARG BASE=python:3\nFROM ${BASE} AS one\nRUN true\nFROM one\n"
            'ENV A=1 B="x y"\nENV PATH=/opt:$PATH\nUSER 7:7\nENTRYPOINT ["a"]\nCMD ["b"]\n'
            'VOLUME ["/c"]\nHEALTHCHECK --retries=3 \\\n  CMD ["d", "e"]\n'
        )
        stages = read_stages(dockerfile, {"BASE": "python:4"})
        image = image_of(dockerfile, tmp_path)

        assert [stage.base for stage, _ in stages] == ["python:4", "one"]
        assert stages[0][1] == [("RUN", "true")]
        assert (image.environment["A"], image.environment["B"]) == ("1", "x y")
        assert image.environment["PATH"].startswith("/opt:/usr")
        assert (image.user, image.entrypoint, image.command) == ("7:7", ["a"], ["b"])
        assert (image.volumes, image.healthcheck) == (["/c"], ["d", "e"])
