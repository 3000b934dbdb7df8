"""Extending a device's table of tiles."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.device import device_name
from engine.kernels.triton.tune import (
    best_tile,
    candidates,
    main,
    make_parser,
    narrowed,
    same_bits,
    with_splits,
    with_stages,
)
from engine.kernels.triton.tuning import (
    FOLDER_VARIABLE,
    DeviceTable,
    Layout,
    Tile,
    default_skipping_tile,
    default_tile,
    of_same_splits,
    save_table,
    tile_for,
    tile_key,
)
from tests.engine.kernels.triton.devices import DEVICE

TILE = Tile(block_n=16, block_k=16, splits=2, num_warps=4, num_stages=2)


@pytest.mark.parametrize("layout", Layout)
def test_the_fastest_tile_is_one_of_those_tried(layout: Layout) -> None:
    lines: list[str] = []
    tried = [TILE, replace(TILE, block_n=32)]

    found = best_tile(
        layout,
        48,
        40,
        torch.float32,
        DEVICE,
        choices=[lambda _: tried],
        rows=(1, 2),
        cache_bytes=1,
        repeats=1,
        progress=lines.append,
    )

    assert found in [default_tile(layout, 48, 40, torch.float32), *tried]
    assert lines[0].startswith(f"{layout} 48x40 float32: default")


@pytest.mark.parametrize("layout", Layout)
def test_the_skipping_tile_has_the_splits_of_the_other(layout: Layout) -> None:
    tried = [of_same_splits(replace(TILE, block_n=32, block_m=16), TILE)]

    found = best_tile(
        layout,
        48,
        300,
        torch.float32,
        DEVICE,
        choices=[lambda _: tried],
        rows=(1,),
        cache_bytes=1,
        repeats=1,
        skipping=TILE,
        progress=lambda _: None,
    )

    assert found in [of_same_splits(default_skipping_tile(layout, torch.float32), TILE), *tried]
    assert found.split_size(300) == TILE.split_size(300)


@pytest.mark.parametrize("layout", Layout)
def test_other_splits_are_other_bits(layout: Layout) -> None:
    shape = (48, 300) if layout is Layout.OUT_IN else (300, 48)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    assert same_bits(TILE, replace(TILE, block_n=32, block_m=16), weight, layout, DEVICE)
    assert not same_bits(TILE, replace(TILE, splits=3), weight, layout, DEVICE)


def test_what_is_tried_are_tiles_around_the_default() -> None:
    start = default_tile(Layout.OUT_IN, 4096, 4096, torch.bfloat16)
    assert start in candidates(start)
    assert {tile.splits for tile in candidates(start)} == {start.splits}
    assert {replace(tile, splits=1) for tile in with_splits(start)} == {replace(start, splits=1)}
    assert {tile.block_m for tile in narrowed(start)} == {16}
    assert {replace(tile, num_stages=1) for tile in with_stages(start)} == {replace(start, num_stages=1)}


def test_a_table_counts_as_soon_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    arguments = (Layout.IN_OUT, 48, 40, torch.float32)
    save_table(device_name(DEVICE), DeviceTable({}, {}))
    before = tile_for(*arguments, DEVICE)

    save_table(device_name(DEVICE), DeviceTable({tile_key(*arguments): TILE}, {}))
    after = tile_for(*arguments, DEVICE)
    save_table(device_name(DEVICE), DeviceTable({}, {}))  # forgets the tile for the tests that follow

    assert before == default_tile(*arguments)
    assert after == TILE


class TestCommandLine:
    def test_shapes(self) -> None:
        options = make_parser().parse_args(["--linear", "12288x4096", "32000x4096", "--feed-forward", "4096x11008"])
        assert options.linear == [(12288, 4096), (32000, 4096)]
        assert options.feed_forward == [(4096, 11008)]
        assert options.dtype == "bfloat16"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--linear", "4096"], "such as 4096x11008, got '4096'"),
            (["--linear", "0x8"], "got '0x8'"),
            (["--linear", "8x8", "--jobs", "0"], "--jobs must be at least 1"),
            ([], "nothing to tune: name weights with --linear or --feed-forward"),
        ],
    )
    def test_bad_arguments_are_refused(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in " ".join(capsys.readouterr().err.split())

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_without_a_gpu_it_says_what_is_missing(self) -> None:
        with pytest.raises(SystemExit, match="tuning needs a CUDA device"):
            main(["--linear", "64x64"])
