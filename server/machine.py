"""What a measurement ran on. Every benchmark result carries this description."""

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("siluette", "torch", "numba", "numpy", "transformers", "uvicorn", "uvloop")
# Instruction sets that decide which kernels are fast, in the spelling of /proc/cpuinfo.
NOTABLE_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
_FILLER = {"r", "tm", "cpu", "processor", "core", "with", "radeon", "graphics"}


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine and the software that bears on speed. No host name, no path.

    Attributes:
        cores: Logical cores that this process may run on.
        memory_gib: Main memory in GiB; None where the system does not say.
        cpu_flags: Those of `NOTABLE_FLAGS` that the processor has; empty where the system does not say.
        packages: Name to installed version.
    """

    cpu: str
    cores: int
    memory_gib: float | None
    cpu_flags: tuple[str, ...]
    os: str
    python: str
    packages: dict[str, str]

    @property
    def slug(self) -> str:
        """A short name of processor and core count for file names, such as `amd-epyc-9b45-4c`."""
        words = re.findall(r"[a-z0-9.]+", re.sub(r"@.*|\d+-core", "", self.cpu.lower()))
        return "-".join([*(word for word in words if word not in _FILLER), f"{self.cores}c"])


def describe_machine() -> Machine:
    """Describe the machine that this process runs on, without importing anything heavy."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    cpuinfo = _cpuinfo()
    flags = set((cpuinfo.get("flags") or cpuinfo.get("Features") or "").split())
    return Machine(
        cpu=cpuinfo.get("model name") or _cpu_of_macos() or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=_memory_gib(),
        cpu_flags=tuple(flag for flag in NOTABLE_FLAGS if flag in flags),
        os=" ".join([platform.system(), *re.findall(r"^\d+\.\d+", platform.release()), platform.machine()]),
        python=platform.python_version(),
        packages=packages,
    )


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; empty where there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _cpu_of_macos() -> str | None:
    if platform.system() != "Darwin":
        return None
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
