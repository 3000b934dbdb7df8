"""The down projection from neuron-major weights, with and without the rows of idle neurons."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.kernels.triton.down import launch_down
from engine.kernels.triton.linear import launch_reduce
from engine.kernels.triton.tuning import Tile, of_same_splits
from tests.engine.kernels.kinds import normal
from tests.engine.kernels.triton.devices import DEVICE, ROWS, every_dtype

INTERMEDIATE, HIDDEN = 200, 72
TILE = Tile(block_n=32, block_k=32, splits=3, num_warps=4, num_stages=2)
# The interpreter adds up the inputs that are loaded at once in an order of its own; a GPU always adds one by one.
SKIPPING = [
    of_same_splits(replace(TILE, block_n=block_n, block_k=block_k), TILE)
    for block_n, block_k in ((32, 32), (16, 32), (64, 64), (32, 16))
    if block_k == TILE.block_k or DEVICE.type == "cuda"
]
TOLERANCE = 1e-5  # sums of 200 products near 1, in float32


def inputs(rows: int, idle: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden values with a share of neurons that is 0 in all rows, weights, flags of one tile of rows."""
    h = normal(rows, INTERMEDIATE, seed=1, dtype=dtype)
    used = torch.rand(INTERMEDIATE, generator=torch.Generator().manual_seed(2)) >= idle
    h[:, ~used] = 0
    weight = normal(INTERMEDIATE, HIDDEN, seed=3, dtype=dtype)
    return h.to(DEVICE), weight.to(DEVICE), used.to(torch.uint8)[None].to(DEVICE)


def down(h: Tensor, weight: Tensor, flags: Tensor | None, whole: bool, tile: Tile = TILE) -> Tensor:
    """Added to ones."""
    out = torch.ones(len(h), HIDDEN, device=DEVICE)
    if whole:
        launch_down(h, weight, tile, flags, out, whole=True)
    else:
        sums = torch.empty(tile.split_count(INTERMEDIATE), len(h), HIDDEN, device=DEVICE)
        launch_down(h, weight, tile, flags, sums, whole=False)
        launch_reduce(sums, out, add=True)
    return out


@every_dtype
@pytest.mark.parametrize("idle", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("rows", ROWS[1:])
def test_both_paths_and_schedules_have_the_same_bits(rows: int, idle: float, dtype: torch.dtype) -> None:
    h, weight, flags = inputs(rows, idle, dtype)

    results = [down(h, weight, None, whole) for whole in (False, True)]
    results += [down(h, weight, flags, whole, tile) for tile in SKIPPING for whole in (False, True)]

    torch.testing.assert_close(
        results[0].double(), 1 + h.double() @ weight.double(), rtol=0, atol=TOLERANCE * INTERMEDIATE**0.5
    )
    assert all(torch.equal(result, results[0]) for result in results)


def test_weights_of_idle_neurons_are_not_read() -> None:
    h, weight, flags = inputs(3, 0.9, torch.bfloat16)
    expected = down(h, weight, flags, whole=False)
    weight[flags[0] == 0] = torch.nan

    assert torch.equal(down(h, weight, flags, whole=False), expected)


def test_neurons_that_only_others_use_change_no_bit() -> None:
    h, weight, flags = inputs(2, 0.5, torch.bfloat16)
    h[0, ::3] = 0
    own = (h[:1] != 0).to(torch.uint8)

    alone = down(h[:1].contiguous(), weight, own, whole=False)

    assert torch.equal(alone[0], down(h, weight, flags, whole=False)[0])


def test_minus_0_of_an_idle_neuron_changes_no_bit() -> None:
    h, weight, _ = inputs(1, 0.0, torch.float32)
    h[:] = -0.0

    out = torch.zeros(1, HIDDEN, device=DEVICE)
    launch_down(h, weight, TILE, None, out, whole=True)

    assert not out.signbit().any()
