"""Operations that must be the same under the interpreter and on a GPU."""

import torch
import triton
import triton.language as tl

from engine.kernels.triton.arithmetic import multiply_add, rounded
from tests.engine.kernels.kinds import normal
from tests.engine.kernels.triton.devices import DEVICE, every_dtype


@triton.jit
def _round_kernel(values, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, rounded(tl.load(values + at), out.dtype.element_ty))


@triton.jit
def _multiply_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    total = tl.load(out + m * N + n)
    total = multiply_add(tl.load(a + m * K + k[None, :]), tl.load(b + k[:, None] * N + n), total)
    tl.store(out + m * N + n, total)


@every_dtype
def test_values_are_rounded_to_the_nearest_and_ties_to_even(dtype: torch.dtype) -> None:
    special = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1.99999, -3.99999, 3.3e38, torch.inf, -torch.inf, torch.nan, 1e-39]
    values = torch.cat((torch.tensor(special), normal(512 - len(special), seed=1))).to(DEVICE)
    out = torch.empty(512, dtype=dtype, device=DEVICE)

    _round_kernel[(1,)](values, out, 512)

    torch.testing.assert_close(out, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit()[:9], values.signbit()[:9])


@every_dtype
def test_products_are_added_in_float32(dtype: torch.dtype) -> None:
    a, b = (normal(64, 64, seed=seed, dtype=dtype).to(DEVICE) for seed in (1, 2))
    start = normal(64, 64, seed=3).to(DEVICE)
    out = start.clone()

    _multiply_kernel[(1,)](a, b, out, 64, 64, 64)

    torch.testing.assert_close(out.double(), start.double() + a.double() @ b.double(), rtol=0, atol=2e-5)
