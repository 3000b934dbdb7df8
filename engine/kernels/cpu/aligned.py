"""Arrays that begin at a cache line: tiles and vectors that straddle two lines take twice as long to load."""

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

CACHE_LINE = 64  # bytes


def empty(shape: int | tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """`numpy.empty`, aligned."""
    shape = (shape,) if isinstance(shape, int) else shape
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + CACHE_LINE, np.uint8)
    begin = -memory.ctypes.data % CACHE_LINE
    return memory[begin : begin + size].view(dtype).reshape(shape)


def zeros(shape: int | tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """`numpy.zeros`, aligned."""
    array = empty(shape, dtype)
    array.fill(0)
    return array
