"""Scratch memory of the kernels, allocated once: a step allocates nothing and can be captured in a CUDA graph."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes, as CUDA aligns its own allocations

Part = tuple[tuple[int, ...], torch.dtype]


class Workspace:
    """One piece of memory that kernels of one stream use in turn. What is in it is garbage after each call.

    Args:
        size: Bytes.
        device: Where.
    """

    def __init__(self, size: int, device: torch.device | str) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)

    @property
    def size(self) -> int:
        """Bytes."""
        return self._memory.numel()

    def carve(self, parts: Sequence[Part]) -> list[Tensor]:
        """Tensors of these shapes and types, one after another from the beginning of the memory.

        Raises:
            ValueError: They do not fit.
        """
        if bytes_of(parts) > self.size:
            raise ValueError(f"workspace of {self.size} bytes is too small: {bytes_of(parts)} are needed")
        tensors, start = [], 0
        for shape, dtype in parts:
            size = math.prod(shape) * dtype.itemsize
            tensors.append(self._memory[start : start + size].view(dtype).view(shape))
            start += _aligned(size)
        return tensors


def bytes_of(parts: Sequence[Part]) -> int:
    """Bytes that `Workspace.carve` needs for these shapes and types."""
    return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in parts)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
