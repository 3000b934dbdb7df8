"""Compiles Triton kernels for a GPU that is not there: `python -m tests.engine.kernels.triton.compiler 90 MODULE`.

MODULE has a function `launches()` that yields names and calls of launchers on tensors in CPU memory. Each kernel that a
call would start is compiled down to the GPU's own code instead, with the very arguments of the call. What came out is
printed as JSON.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

MULTIPLY = re.compile(r"\b(?:wgmma\.mma_async|mma)\.sync\S+|\btcgen05\.mma\.\S+")
COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (\w+)")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class AbsentDevice:
    """What the compiler asks a driver for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def describe(kernel: Any) -> dict[str, Any]:
    """Of a compiled kernel: its matrix instructions, bytes of asynchronous copies, memory and registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures = {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    return {
        "kernel": kernel.metadata.name,
        "instructions": sorted(set(MULTIPLY.findall(ptx))),
        "copies": sorted({int(size, 0) for size in COPY.findall(ptx)}),
        "shared": kernel.metadata.shared,
        **figures,
    }


def main() -> None:
    capability, module = int(sys.argv[1]), importlib.import_module(sys.argv[2])
    driver.set_active(AbsentDevice(capability))
    kernels: list[Any] = []

    def compile_only(self: JITFunction, grid: object) -> Any:
        return lambda *args, **kwargs: kernels.append(self.run(*args, grid=grid, warmup=True, **kwargs))

    JITFunction.__getitem__ = compile_only
    found = {}
    for name, launch in module.launches():
        kernels.clear()
        launch()
        found[name] = [describe(kernel) for kernel in kernels]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
