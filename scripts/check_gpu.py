"""Everything that only a GPU can show, by one command: `python scripts/check_gpu.py FOLDER`.

Runs the tests of the Triton kernels compiled, again under NVIDIA's compute-sanitizer where it is installed, and both
benchmarks of GPUs. Logs and results go to FOLDER, and what came of each to FOLDER/summary.json.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine.config import Device, EngineConfig
from engine.device import choose_device, device_name
from engine.errors import InvalidConfig

ROOT = Path(__file__).parent.parent
TESTS = "tests/engine/kernels/triton"
SANITIZER = "compute-sanitizer"
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")
FOUND = "9"  # exit status of the sanitizer where it found something
# What the sanitizer slows down many times without a kernel of ours in it.
UNSANITIZED = "not compiled and not default_model"


@dataclass(frozen=True, slots=True)
class Check:
    """One command.

    Attributes:
        name: Of its log, and for `--only`.
        command: Its words.
    """

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a check."""

    name: str
    status: int  # 0: good
    seconds: float


def checks(folder: Path, sanitizer: str | None) -> list[Check]:
    """All checks, in the order in which they are worth doing.

    Args:
        folder: Where benchmarks write.
        sanitizer: Path of compute-sanitizer; None where it is not installed.
    """
    pytest = (sys.executable, "-m", "pytest", "-q", TESTS)
    benchmarks = [
        Check(name, (sys.executable, "-m", f"bench.{name}", "--out", str(folder))) for name in ("ffn_gpu", "decode_gpu")
    ]
    sanitized = [
        Check(
            tool,
            (
                sanitizer,
                "--tool",
                tool,
                "--error-exitcode",
                FOUND,
                "--target-processes",
                "all",
                *pytest,
                "-k",
                UNSANITIZED,
            ),
        )
        for tool in SANITIZER_TOOLS
        if sanitizer is not None
    ]
    # Compiling takes most of the tests' time, and a sanitizer wants one process.
    return [Check("tests", (*pytest, "-n", "auto")), *benchmarks, *sanitized]


def run(check: Check, folder: Path) -> Outcome:
    """Run a check, its output to `<name>.log`."""
    print(f"== {check.name}", flush=True)
    start = time.perf_counter()
    with (folder / f"{check.name}.log").open("w") as log:
        status = subprocess.run(check.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    outcome = Outcome(check.name, status, round(time.perf_counter() - start, 1))
    print(f"   {'good' if status == 0 else f'FAILED, status {status}'} after {outcome.seconds:.0f} s", flush=True)
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Returns:
        0 if all checks are good.
    """
    parser = argparse.ArgumentParser(prog="python scripts/check_gpu.py", description=__doc__)
    parser.add_argument("folder", type=Path, help="is made if it does not exist")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the checks")
    options = parser.parse_args(arguments)
    sanitizer = shutil.which(SANITIZER)
    chosen = checks(options.folder.absolute(), sanitizer)
    names = [check.name for check in chosen]
    if unknown := sorted(set(options.only or ()) - set(names)):
        parser.error(f"no check {', '.join(unknown)}; there are {', '.join(names)}")
    try:
        device = choose_device(EngineConfig(device=Device.CUDA))
    except InvalidConfig as error:
        parser.error(str(error))
    if sanitizer is None:
        print(f"{SANITIZER} is not installed: its checks are left out")
    options.folder.mkdir(parents=True, exist_ok=True)
    outcomes = [run(check, options.folder) for check in chosen if not options.only or check.name in options.only]
    summary = {
        "device": device_name(device),
        "torch": torch.__version__,
        "sanitizer": sanitizer is not None,
        "checks": [asdict(outcome) for outcome in outcomes],
    }
    (options.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return int(any(outcome.status for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
