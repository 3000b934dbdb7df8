"""Numbers for tests of integer kernels, chosen so that results can be told exactly."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
rng = np.random.default_rng


def integers(*shape: int, seed: int, most: int, dtype: Any) -> Array:
    """Random integers, the largest ones among them."""
    values = rng(seed).integers(-most, most + 1, shape)
    values.reshape(-1)[::5] = most
    values.reshape(-1)[1::7] = -most
    return values.astype(dtype)


def powers(*shape: int, seed: int) -> Array:
    """float32 that bfloat16 holds exactly and that products with integers keep exact."""
    return (2.0 ** rng(seed).integers(-20, -9, shape)).astype(np.float32)


def bits(values: Array) -> Array:
    """bfloat16 bits."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
