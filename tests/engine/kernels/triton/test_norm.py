"""RMSNorm and embedding against PyTorch."""

import pytest
import torch
from torch.nn import functional

from engine.kernels.triton.norm import embed, rms_norm
from tests.engine.kernels.kinds import normal
from tests.engine.kernels.triton.devices import DEVICE, ROWS, every_dtype

EPS = 1e-5


@every_dtype
@pytest.mark.parametrize(("rows", "hidden"), [*((rows, 100) for rows in ROWS), (2, 16), (2, 576)])
def test_rms_norm_equals_pytorch(rows: int, hidden: int, dtype: torch.dtype) -> None:
    x, weight = 3 * normal(rows, hidden, seed=1), normal(hidden, seed=2, dtype=dtype)
    out = torch.empty(rows, hidden, dtype=dtype, device=DEVICE)

    rms_norm(x.to(DEVICE), weight.to(DEVICE), EPS, out=out)

    expected = functional.rms_norm(x.double(), (hidden,), weight.double(), EPS)
    tolerance = 2.0**-8 if dtype is torch.bfloat16 else 2e-6
    torch.testing.assert_close(out.cpu().double(), expected, rtol=tolerance, atol=1e-6)


@every_dtype
def test_a_row_is_normed_alike_in_any_batch(dtype: torch.dtype) -> None:
    x, weight = normal(9, 100, seed=1).to(DEVICE), normal(100, seed=2, dtype=dtype).to(DEVICE)
    together, alone = torch.empty(9, 100, dtype=dtype, device=DEVICE), torch.empty(1, 100, dtype=dtype, device=DEVICE)
    rms_norm(x, weight, EPS, out=together)

    rms_norm(x[7:8].clone(), weight, EPS, out=alone)

    assert torch.equal(alone[0], together[7])


@every_dtype
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("splits", [1, 3])
def test_what_a_block_leaves_is_added_first(splits: int, rows: int, dtype: torch.dtype) -> None:
    x, weight = normal(rows, 100, seed=1).to(DEVICE), normal(100, seed=2, dtype=dtype).to(DEVICE)
    addend = 1e4 * normal(splits, rows, 100, seed=3).to(DEVICE)
    total = x + sum(addend[1:], addend[0])
    found, expected = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=dtype)
    rms_norm(total, weight, EPS, out=expected)

    rms_norm(x, weight, EPS, out=found, addend=addend)

    assert torch.equal(x, total)
    assert torch.equal(found, expected)


def test_a_row_of_zeros_stays_one() -> None:
    out = torch.full((1, 16), 7.0, device=DEVICE)

    rms_norm(torch.zeros(1, 16, device=DEVICE), torch.ones(16, device=DEVICE), EPS, out=out)

    assert (out == 0).all()


@every_dtype
@pytest.mark.parametrize("rows", ROWS)
def test_embed_widens_the_tokens_rows(rows: int, dtype: torch.dtype) -> None:
    embedding = normal(50, 100, seed=1, dtype=dtype)
    token_ids = torch.arange(rows) * 7 % 50
    out = torch.empty(rows, 100, device=DEVICE)

    embed(token_ids.to(DEVICE), embedding.to(DEVICE), out=out)

    assert torch.equal(out.cpu(), embedding[token_ids].float())


def test_what_the_kernels_would_misread_is_refused() -> None:
    x, weight = torch.zeros(2, 16, device=DEVICE), torch.ones(16, device=DEVICE)

    with pytest.raises(ValueError, match=r"x must be torch\.float32"):
        rms_norm(x.bfloat16(), weight, EPS, out=x)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(x, weight, EPS, out=torch.zeros(16, 2, device=DEVICE).T)
    with pytest.raises(ValueError, match=r"token_ids must be torch\.int64"):
        embed(torch.zeros(2, dtype=torch.int32, device=DEVICE), x, out=x)
