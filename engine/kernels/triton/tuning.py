"""Tile shapes of products, by device and by shape of the weight: a table that is read, never tuned while serving.

A tile decides how a product is added up (how the inputs are cut into splits, and which instruction multiplies), so it
depends on the weight's shape and type and on the device, and never on the number of rows: a row must get the same
bits in any batch. `devices/<device>.json` holds what was measured (`python -m engine.kernels.triton.tune`); any other
device and shape gets `default_tile`.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from engine.device import device_name

FOLDER = Path(__file__).parent / "devices"
FOLDER_VARIABLE = "SILUETTE_TRITON_TABLES"  # another folder, where the package cannot be written to

ROW_TILE = (
    64  # rows of every tile: decoding and prompts use one matrix instruction, and idle rows cost no memory traffic
)
PROGRAMS = 1024  # that a product of one row tile should have by default, to fill some hundred multiprocessors
SPLIT_INPUTS = 512  # that a split should have at least, so that loads overlap
SLUG = re.compile(r"[^a-z0-9]+")


class Layout(StrEnum):
    """How a weight lies in memory."""

    OUT_IN = "out_in"  # [out, in]: each output's inputs are contiguous
    IN_OUT = "in_out"  # [in, out]: neuron-major `down`, each input's outputs are contiguous


@dataclass(frozen=True, slots=True)
class Tile:
    """How one weight is multiplied.

    Attributes:
        block_n: Outputs of a tile, a power of two of at least 16.
        block_k: Inputs that are loaded at once, likewise.
        splits: Parts of the inputs, each with a chain of sums of its own.
        num_warps: Warps of a program.
        num_stages: Loads in flight, in tiles.
        split_unit: A split has a multiple of so many inputs; None is `block_k`.
        block_m: Rows of the tile where no more are computed; else `ROW_TILE`. Fewer are another matrix instruction on
            some devices, so only the tuner may choose them, when it has seen the same bits.
    """

    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int
    split_unit: int | None = None
    block_m: int = ROW_TILE

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two of at least 16, got {value!r}")
        for name in ("splits", "num_warps", "num_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")

    def split_size(self, inputs: int) -> int:
        """Inputs of a split: a multiple of `split_unit`; the last split may have fewer."""
        unit = self.split_unit or self.block_k
        return -(-inputs // (self.splits * unit)) * unit

    def split_count(self, inputs: int) -> int:
        """Splits that are not empty."""
        return max(1, -(-inputs // self.split_size(inputs)))

    def launch_options(self, inputs: int, rows: int) -> dict[str, int | bool]:
        """What every kernel that multiplies so many rows by a weight with so many inputs is compiled with."""
        return {
            "BLOCK_M": self.block_m if rows <= self.block_m else ROW_TILE,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "EVEN_K": inputs % self.block_k == 0 and self.split_size(inputs) % self.block_k == 0,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True, slots=True)
class DeviceTable:
    """What is known about one device.

    Attributes:
        tiles: By `tile_key`.
        costs: Seconds of both feed-forward paths by `costs_key`, as in `FfnCosts`.
    """

    tiles: Mapping[str, Tile]
    costs: Mapping[str, Mapping[str, tuple[float, ...]]]


EMPTY = DeviceTable({}, {})


def type_name(dtype: torch.dtype) -> str:
    """`bfloat16` or `float32`."""
    return str(dtype).removeprefix("torch.")


def tile_key(layout: Layout, out: int, inputs: int, dtype: torch.dtype, *, skipping: bool = False) -> str:
    """Name of a weight's shape in a table; `skipping` where the kernel reads weights of active neurons only."""
    return f"{'skipping ' if skipping else ''}{layout} {out}x{inputs} {type_name(dtype)}"


def costs_key(hidden: int, intermediate: int, dtype: torch.dtype) -> str:
    """Name of a feed-forward block in a table."""
    return f"{hidden}x{intermediate} {type_name(dtype)}"


def default_tile(layout: Layout, out: int, inputs: int, dtype: torch.dtype) -> Tile:
    """Tile of a shape that nobody has measured.

    float32 products run on plain multiply-add units (the matrix units would round the inputs), which want small tiles.
    """
    wide = dtype is not torch.float32
    block_n = 128 if wide and layout is Layout.IN_OUT else 64
    tiles = -(-out // block_n)
    splits = 2 ** round(math.log2(max(1.0, PROGRAMS / tiles)))
    splits = max(1, min(splits, inputs // SPLIT_INPUTS))
    return Tile(block_n, 64 if wide else 32, splits, num_warps=4, num_stages=3 if block_n == 128 else 4)


def default_skipping_tile(layout: Layout, dtype: torch.dtype) -> Tile:
    """Tile of a kernel that reads weights of active neurons only; its splits are the whole weight's.

    Few neurons are active, so a tile has few of them, lest a few programs have all the work.
    """
    wide = dtype is not torch.float32
    if layout is Layout.OUT_IN:
        return Tile(16, 64 if wide else 32, 1, num_warps=4, num_stages=5)
    return Tile(128 if wide else 64, 64 if wide else 32, 1, num_warps=4, num_stages=3 if wide else 4)


def tile_for(
    layout: Layout, out: int, inputs: int, dtype: torch.dtype, device: torch.device, *, skipping: bool = False
) -> Tile:
    """The device's tile for a weight: from its table, else the default.

    Args:
        layout: Of the weight.
        out: Outputs.
        inputs: Inputs.
        dtype: Of the weight.
        device: Where it lies.
        skipping: For a kernel that reads weights of active neurons only. It adds up the same splits in the same order,
            and may have another tile for that: however many inputs are loaded at once, a split's chain of additions
            goes through them in the steps of one matrix instruction.
    """
    return _tile(layout, out, inputs, dtype, device_name(device), skipping)


@cache
def _tile(layout: Layout, out: int, inputs: int, dtype: torch.dtype, name: str, skipping: bool) -> Tile:
    tiles = load_table(name).tiles
    whole = tiles.get(tile_key(layout, out, inputs, dtype)) or default_tile(layout, out, inputs, dtype)
    if not skipping:
        return whole
    own = tiles.get(tile_key(layout, out, inputs, dtype, skipping=True)) or default_skipping_tile(layout, dtype)
    return of_same_splits(own, whole)


def of_same_splits(tile: Tile, whole: Tile) -> Tile:
    """A tile with the splits of another."""
    return replace(tile, splits=whole.splits, split_unit=whole.split_unit or whole.block_k)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once at least; 1 under Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def table_path(name: str, folder: Path | None = None) -> Path:
    """File of a device, in the folder of the environment variable or else of the package."""
    if folder is None:
        folder = Path(os.environ.get(FOLDER_VARIABLE) or FOLDER)
    return folder / f"{SLUG.sub('-', name.lower()).strip('-')}.json"


def load_table(name: str, folder: Path | None = None) -> DeviceTable:
    """A device's table; empty if it has none.

    Raises:
        ValueError: The file is not such a table; says which file.
    """
    path = table_path(name, folder)
    if not path.exists():
        return EMPTY
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        tiles = {key: Tile(**entry) for key, entry in document["tiles"].items()}
        costs = {
            key: {side: tuple(map(float, seconds)) for side, seconds in entry.items()}
            for key, entry in document["costs"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a tuning table: {error!r}") from error
    return DeviceTable(tiles, costs)


def save_table(name: str, table: DeviceTable, folder: Path | None = None) -> Path:
    """Write a device's table, with the versions it was measured with; it counts from now on."""
    document = {
        "device": name,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "tiles": {key: asdict(tile) for key, tile in sorted(table.tiles.items())},
        "costs": {key: dict(entry) for key, entry in sorted(table.costs.items())},
    }
    path = table_path(name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
    _tile.cache_clear()
    return path
