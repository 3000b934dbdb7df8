"""How weights are stored, and what token rows look like that meet them: the one place that knows all formats."""

from enum import Enum, auto
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.cpu import aligned
from engine.kernels.cpu.down import down_tiles
from engine.kernels.cpu.integer import integer_down_tiles, integer_tiles
from engine.kernels.cpu.integer_rows import IntegerHidden, IntegerRows, PlainIntegerHidden, PlainIntegerRows
from engine.kernels.cpu.product import PlainRows, TileRows, product_tiles, tile_columns
from engine.kernels.cpu.quantise import quantise_down, quantise_int4, quantise_int8
from engine.kernels.cpu.quantised import INT4_GROUP, INT4_UNIT, INT8_GROUP, INT8_UNIT, lane_order
from engine.kernels.cpu.tiles import ROWS

Array = NDArray[Any]


class Format(Enum):
    """Of one weight."""

    FLOAT = auto()  # float32, or bfloat16 bits
    INT8 = auto()
    INT4 = auto()

    @property
    def group(self) -> int:
        """Values that share a scale."""
        return INT4_GROUP if self is Format.INT4 else INT8_GROUP

    @property
    def of_down(self) -> "Format":
        """What `down` has where the other weights of a layer have this one: 4 bits are too few for it."""
        return Format.INT8 if self is Format.INT4 else self


def as_array(tensor: Tensor) -> Array:
    """A NumPy view of a tensor; bfloat16, which NumPy lacks, as its bits in uint16."""
    array: Array = (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def store(weight: Tensor, kind: Format, *, amx: bool) -> Any:
    """A weight [layers, out, in] in its format, quantised ones laid out for AMX or for vector loops."""
    array = as_array(weight)
    if kind is Format.FLOAT:
        return array.reshape(len(array), -1)
    return quantise_int8(array, amx=amx) if kind is Format.INT8 else quantise_int4(array, amx=amx)


def store_down(weight: Tensor, kind: Format) -> Any:
    """`down` [layers, intermediate, hidden], in `kind.of_down`."""
    array = as_array(weight)
    return array.reshape(len(array), -1) if kind is Format.FLOAT else quantise_down(array)


def make_rows(kind: Format, rows: int, size: int, *, amx: bool) -> Any:
    """Memory for token rows of `size` values that meet weights of a format."""
    padded = -(-rows // ROWS) * ROWS
    if kind is Format.FLOAT:
        if amx:
            return TileRows(aligned.zeros(padded * size // 2, np.uint32))
        return PlainRows(aligned.zeros(padded * size, np.float32))
    scales, sums = (aligned.zeros(padded * (size // kind.group), np.float32) for _ in range(2))
    if amx:
        high, low = (aligned.zeros(padded * size // 4, np.uint32) for _ in range(2))
        return IntegerRows(high, low, scales, sums)
    int4 = kind is Format.INT4
    order = lane_order(size, kind.group, INT4_UNIT if int4 else INT8_UNIT)
    values = aligned.zeros(2 * padded * size, np.int8) if int4 else aligned.zeros(padded * size, np.int16)
    return PlainIntegerRows(values, order, scales, sums)


def make_hidden(kind: Format, size: int, *, amx: bool) -> Any:
    """Memory for `size` values of act(gate) * up on their way to `down`."""
    if kind is Format.FLOAT:
        return aligned.zeros(size, np.uint16 if amx else np.float32)
    scales = aligned.zeros(size // INT8_GROUP, np.float32)
    if amx:
        return IntegerHidden(aligned.zeros(size, np.int8), aligned.zeros(size, np.int8), scales)
    return PlainIntegerHidden(aligned.zeros(size, np.int16), scales)


@lru_cache
def _tiles(kind: Format, columns: int) -> Array:
    return product_tiles(columns) if kind is Format.FLOAT else integer_tiles(columns, kind.group)


@lru_cache
def _down_tiles(kind: Format, rows: int) -> Array:
    return down_tiles(rows) if kind is Format.FLOAT else integer_down_tiles(rows)


def tiles_for(kind: Format, rows: int, *, amx: bool) -> Array | None:
    """Shapes of tiles for products of so many token rows; None without AMX."""
    return _tiles(kind, tile_columns(rows)) if amx else None


def down_tiles_for(kind: Format, rows: int, *, amx: bool) -> Array | None:
    """Likewise for the product by `down`."""
    return _down_tiles(kind, tile_columns(rows)) if amx else None
