"""Products that give a row the same bits in any batch and by either schedule."""

import pytest
import torch
from torch import Tensor

from engine.kernels.triton import linear as module
from engine.kernels.triton.linear import Workspace, linear
from engine.kernels.triton.tuning import Tile
from tests.engine.kernels.kinds import normal
from tests.engine.kernels.triton.devices import DEVICE, ROWS, every_dtype

# Inputs that do and do not divide a tile's block, fewer than a block, and enough for splits of the default tile.
SHAPES = [(72, 100), (64, 128), (72, 1100), (3, 5)]
TOLERANCE = {torch.bfloat16: 2e-6, torch.float32: 2e-6}  # inputs are exact in float32, sums are float32


def inputs(rows: int, width: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    x = normal(rows, size, seed=1, dtype=dtype)
    weight = normal(width, size, seed=2, dtype=dtype, scale=size**-0.5)
    return x.to(DEVICE), weight.to(DEVICE), normal(width, seed=3, dtype=dtype).to(DEVICE)


@pytest.fixture(scope="module")
def workspace() -> Workspace:
    return Workspace(4_000_000, DEVICE)


@every_dtype
@pytest.mark.parametrize(("width", "size"), SHAPES)
@pytest.mark.parametrize("rows", [*ROWS, 70])
def test_equals_the_product_in_float64(
    rows: int, width: int, size: int, dtype: torch.dtype, workspace: Workspace
) -> None:
    x, weight, bias = inputs(rows, width, size, dtype)

    out = linear(x, weight, bias, workspace=workspace)

    torch.testing.assert_close(
        out.double(), x.double() @ weight.double().t() + bias.double(), rtol=0, atol=TOLERANCE[dtype] * 4
    )


def test_adds_to_a_residual_stream(workspace: Workspace) -> None:
    x, weight, bias = inputs(3, 72, 100, torch.float32)
    residual = normal(3, 72, seed=4).to(DEVICE)
    plain = linear(x, weight, bias, workspace=workspace)

    out = residual.clone()
    found = linear(x, weight, bias, out=out, add=True, workspace=workspace)

    assert found is out
    assert torch.equal(out, residual + plain)


@every_dtype
def test_a_row_has_the_same_bits_in_any_batch_and_place(dtype: torch.dtype, workspace: Workspace) -> None:
    x, weight, _ = inputs(150, 16, 1100, dtype)
    whole = linear(x, weight, workspace=workspace)

    for rows in ([7], [149], [3, 7], [*range(100, 140)], [149, 7, 3]):
        assert torch.equal(linear(x[rows], weight, workspace=workspace), whole[rows])


@every_dtype
def test_both_schedules_have_the_same_bits(dtype: torch.dtype) -> None:
    x, weight, bias = inputs(33, 72, 300, dtype)
    tile = Tile(block_n=32, block_k=32, splits=5, num_warps=4, num_stages=2)
    parts = torch.empty(tile.split_count(300), 33, 72, device=DEVICE)
    one, two = torch.empty(33, 72, device=DEVICE), torch.empty(33, 72, device=DEVICE)

    module.launch_product(x, weight, tile, parts, whole=False)
    module.launch_reduce(parts, one, bias=bias)
    module.launch_product(x, weight, tile, two, whole=True, bias=bias)

    assert len(parts) == 5
    assert torch.equal(one, two)


def test_splits_are_added_in_order() -> None:
    """2**24 + 1 - 2**24 is 0 in that order of float32, and 1 in another."""
    tile = Tile(block_n=16, block_k=16, splits=3, num_warps=4, num_stages=2)
    weight = torch.ones(16, 48, device=DEVICE)
    x = torch.zeros(1, 48, device=DEVICE)
    x[0, 0], x[0, 16], x[0, 32] = 2.0**24, 1.0, -(2.0**24)
    parts, out = torch.empty(3, 1, 16, device=DEVICE), torch.empty(1, 16, device=DEVICE)

    module.launch_product(x, weight, tile, parts, whole=False)
    module.launch_reduce(parts, out)

    assert parts[:, 0, 0].tolist() == [2.0**24, 1.0, -(2.0**24)]
    assert out.tolist() == [[0.0] * 16]


@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy, by which the interpreter computes
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_spoils_no_other(poison: float, workspace: Workspace) -> None:
    x, weight, _ = inputs(3, 72, 100, torch.bfloat16)
    clean = linear(x, weight, workspace=workspace)
    x[1, 5] = poison

    out = linear(x, weight, workspace=workspace)

    assert not out[1].isfinite().any()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


class TestBadInput:
    x, weight = torch.zeros(2, 32, device=DEVICE), torch.zeros(48, 32, device=DEVICE)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"x": torch.zeros(2, 33)}, r"x must have shape \[2, 32\], got \[2, 33\]"),
            ({"x": torch.zeros(2, 32, dtype=torch.bfloat16)}, "x must be torch.float32, got torch.bfloat16"),
            ({"weight": torch.zeros(32, 48).t()}, "weight must be contiguous"),
            ({"weight": torch.zeros(48, 32, dtype=torch.float64)}, "weight must be torch.bfloat16 or torch.float32"),
            ({"out": torch.zeros(2, 48, dtype=torch.bfloat16)}, "out must be torch.float32"),
            ({"bias": torch.zeros(32)}, r"bias must have shape \[48\], got \[32\]"),
            ({"add": True}, "add needs out"),
        ],
    )
    def test_is_refused_by_name(self, changes: dict[str, object], message: str, workspace: Workspace) -> None:
        arguments = {"x": self.x, "weight": self.weight, "workspace": workspace} | changes
        with pytest.raises(ValueError, match=message):
            linear(**arguments)

    def test_a_workspace_too_small_says_what_is_needed(self) -> None:
        x, weight, _ = inputs(2, 136, 1100, torch.float32)
        with pytest.raises(ValueError, match="workspace of 10 bytes is too small"):
            linear(x, weight, workspace=Workspace(10, DEVICE))
