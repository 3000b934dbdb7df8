"""What benchmarks of GPUs share: the device's description and how fast its memory can be read."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # words of four bytes that a program reads at once
WAVES = 8  # programs for each multiprocessor


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name and size of the device, and versions of what runs on it."""
    versions = {"torch": torch.__version__, "triton": version("triton"), "cuda": torch.version.cuda}
    if device.type != "cuda":
        return {"name": "Triton interpreter", **versions}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size / 2**20,
        **versions,
    }


@triton.jit
def _read_kernel(words, sums, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """sums[p] = sum of every p-th block of int32 words, so that nothing but the reading takes time."""
    total = tl.zeros((BLOCK,), tl.int32)
    for first in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(words + at, mask=at < size, other=0)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


class PlainRead:
    """A kernel that reads tensors and does nothing else: what the device's bandwidth is in practice.

    Args:
        tensors: Contiguous; what is left of one after its last four bytes is not read.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        flat = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
        self._words = [part[: len(part) // 4 * 4].view(torch.int32) for part in flat]
        device = tensors[0].device
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self._programs = WAVES * processors
        self.sums = torch.zeros(self._programs, dtype=torch.int32, device=device)

    @property
    def bytes(self) -> int:
        """That one call reads."""
        return sum(part.nbytes for part in self._words)

    def __call__(self) -> None:
        """Read all tensors once."""
        for words in self._words:
            _read_kernel[(self._programs,)](words, self.sums, len(words), BLOCK=BLOCK, num_warps=8)
