"""The kinds of products that the CPU kernels have, and what these take and give, as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.cpu.down import down_tiles
from engine.kernels.cpu.formats import as_array
from engine.kernels.cpu.isa import has_amx
from engine.kernels.cpu.linear import prepare
from engine.kernels.cpu.product import PlainRows, TileRows, product_tiles
from engine.kernels.cpu.rows import CHUNK
from engine.kernels.cpu.tiles import ROWS

Array = NDArray[Any]

# The type of weights decides how vectors are laid out, whatever the kernel.
EVENS_FIRST = [*range(0, CHUNK, 2), *range(1, CHUNK, 2)]


@dataclass(frozen=True)
class Kind:
    """Weights of a type, multiplied by AMX tiles or by vector loops."""

    dtype: torch.dtype
    amx: bool

    def rounded(self, x: Tensor) -> Tensor:
        """Token rows in float64, as the products see them: tiles take bfloat16."""
        return (x.bfloat16() if self.amx else x).double()

    def pack(self, x: Tensor, weight: Tensor, stale: float = torch.nan) -> TileRows | PlainRows:
        """Token rows, float32 [rows, in], as products by `weight` take them; the rest of the memory holds garbage."""
        rows, size = x.shape
        padded = -(-rows // ROWS) * ROWS
        garbage = torch.full((padded * size,), stale, dtype=torch.bfloat16 if self.amx else torch.float32)
        memory = as_array(garbage)
        inputs = TileRows(memory.view(np.uint32)) if self.amx else PlainRows(memory)
        none = np.empty(0, np.float32)
        prepare(0, 1, x.numpy(), none, np.float32(0), inputs, as_array(weight).reshape(-1))
        return inputs

    def tiles(self, rows: int) -> Array | None:
        """Tile shapes of products of so many rows."""
        return product_tiles(rows) if self.amx else None

    def down_tiles(self, rows: int) -> Array | None:
        """Tile shapes of the product by `down`."""
        return down_tiles(rows) if self.amx else None


def ordered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors [..., size] as they lie beside rows of weights of this type."""
    return x if dtype is torch.float32 else x.unflatten(-1, (-1, CHUNK))[..., EVENS_FIRST].flatten(-2)


def in_columns(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The way back from `ordered`."""
    back = torch.tensor(EVENS_FIRST).argsort()
    return x if dtype is torch.float32 else x.unflatten(-1, (-1, CHUNK))[..., back].flatten(-2)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Random numbers that are the same each time."""
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def _parameters(kinds: Sequence[tuple[str, Kind]]) -> Any:
    without = pytest.mark.skipif(
        not has_amx(), reason="this processor has no AMX, or the system does not let it be used"
    )
    return pytest.mark.parametrize(
        "kind", [pytest.param(kind, id=name, marks=[without] if kind.amx else []) for name, kind in kinds]
    )


FLOAT32, BFLOAT16, AMX = Kind(torch.float32, False), Kind(torch.bfloat16, False), Kind(torch.bfloat16, True)
every_kind = _parameters([("float32", FLOAT32), ("bfloat16", BFLOAT16), ("amx", AMX)])
only_amx = _parameters([("amx", AMX)])
