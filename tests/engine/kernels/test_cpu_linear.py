"""Token rows as they are laid out for products; see test_cpu_product for these."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from engine.kernels.cpu.formats import as_array
from engine.kernels.cpu.linear import prepare
from engine.kernels.cpu.options import FEW_ROWS
from engine.kernels.cpu.product import PlainRows
from tests.engine.kernels.kinds import BFLOAT16, FLOAT32, Kind, normal, only_amx, ordered


@pytest.mark.parametrize("kind", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 40])
@pytest.mark.parametrize("size", [64, 96, 576])
@pytest.mark.parametrize("shares", [1, 3, 64])
def test_rows_are_normalised_before_products(shares: int, size: int, rows: int, kind: Kind) -> None:
    x, weight = normal(rows, size, seed=1, scale=3.0), normal(size, seed=2)
    linear = as_array(torch.empty(0, dtype=kind.dtype))
    packed = np.full(rows * size, np.nan, np.float32)

    for share in range(shares):
        prepare(share, shares, x.numpy(), weight.numpy(), np.float32(1e-3), PlainRows(packed), linear)

    exact = ordered(functional.rms_norm(x.double(), (size,), weight.double(), 1e-3), kind.dtype).float()
    torch.testing.assert_close(torch.from_numpy(packed).reshape(rows, size), exact, rtol=1e-6, atol=1e-7)


@only_amx
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 40])
def test_rows_for_tiles_are_rounded_to_pairs_of_bfloat16_in_columns(rows: int, kind: Kind) -> None:
    x = normal(rows, 64, seed=1)

    pairs = torch.from_numpy(kind.pack(x, torch.empty(0, dtype=kind.dtype)).pairs.view(np.uint16))

    for tile, some in enumerate(x.split(16)):
        columns = min(rows, 16)
        found = pairs.view(torch.bfloat16)[tile * 64 * columns :][: 64 * columns].reshape(32, columns, 2)
        assert torch.equal(found[:, : len(some)].transpose(0, 1).flatten(1), some.bfloat16())
