"""Tables of tiles, by device and by shape of the weight."""

from pathlib import Path

import pytest
import torch

from engine.kernels.triton.tuning import (
    FOLDER,
    DeviceTable,
    Layout,
    Tile,
    costs_key,
    default_tile,
    load_table,
    save_table,
    table_path,
    tile_for,
    tile_key,
)

SHAPES = [(576, 576), (4096, 4096), (11008, 4096), (4096, 11008), (128256, 4096), (64, 72), (1, 1)]
TILE = Tile(block_n=64, block_k=128, splits=4, num_warps=8, num_stages=3)


class TestTile:
    @pytest.mark.parametrize("inputs", [1, 63, 64, 65, 1000, 4096])
    @pytest.mark.parametrize("splits", [1, 3, 16])
    def test_splits_cover_the_inputs_in_whole_blocks(self, inputs: int, splits: int) -> None:
        tile = Tile(64, 64, splits, 4, 3)
        size, count = tile.split_size(inputs), tile.split_count(inputs)

        assert size % tile.block_k == 0
        assert (count - 1) * size < inputs <= count * size
        assert count <= splits

    @pytest.mark.parametrize(
        ("changes", "message"), [({"block_n": 48}, "block_n must be a power of two"), ({"splits": 0}, "splits must be")]
    )
    def test_what_no_kernel_can_do_is_refused(self, changes: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Tile(**{"block_n": 64, "block_k": 64, "splits": 1, "num_warps": 4, "num_stages": 2} | changes)


class TestDefault:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("layout", Layout)
    @pytest.mark.parametrize(("out", "inputs"), SHAPES)
    def test_every_shape_has_a_tile(self, layout: Layout, out: int, inputs: int, dtype: torch.dtype) -> None:
        tile = default_tile(layout, out, inputs, dtype)
        assert tile.split_size(inputs) >= min(inputs, 512)

    def test_one_row_of_a_square_weight_fills_a_large_device(self) -> None:
        tile = default_tile(Layout.OUT_IN, 4096, 4096, torch.bfloat16)
        assert 4096 // tile.block_n * tile.split_count(4096) >= 2 * 132

    def test_is_used_where_nothing_was_measured(self) -> None:
        found = tile_for(Layout.OUT_IN, 72, 100, torch.float32, torch.device("cpu"))
        assert found == default_tile(Layout.OUT_IN, 72, 100, torch.float32)


class TestTable:
    TABLE = DeviceTable(
        {tile_key(Layout.OUT_IN, 4096, 11008, torch.bfloat16): TILE},
        {
            costs_key(4096, 11008, torch.bfloat16): {
                "dense": (1.0, 2.0),
                "sparse_low": (0.5, 1.0),
                "sparse_high": (0.25, 0.5),
            }
        },
    )

    def test_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        save_table("NVIDIA H100 80GB HBM3", self.TABLE, tmp_path)

        assert load_table("NVIDIA H100 80GB HBM3", tmp_path) == self.TABLE
        assert (tmp_path / "nvidia-h100-80gb-hbm3.json").is_file()

    def test_of_an_unknown_device_is_empty(self, tmp_path: Path) -> None:
        assert load_table("something new", tmp_path) == DeviceTable({}, {})

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"tiles": {"a": {"block": 1}}, "costs": {}}'])
    def test_a_broken_file_is_named(self, text: str, tmp_path: Path) -> None:
        path = table_path("device", tmp_path)
        path.write_text(text)

        with pytest.raises(ValueError, match=r"device\.json is not a tuning table"):
            load_table("device", tmp_path)

    def test_those_of_the_project_can_be_read(self) -> None:
        for path in FOLDER.glob("*.json"):
            assert load_table(path.stem).tiles
