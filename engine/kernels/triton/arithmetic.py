"""Two operations for kernels that Triton's interpreter does otherwise than a GPU, and what stands in for them there."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def multiply_add(a, b, total):  # type: ignore[no-untyped-def]
    """total + a @ b, float32 [M, N]; a [M, K] and b [K, N] of one type. float32 is not rounded."""
    if INTERPRETED:
        # The interpreter's dot takes bfloat16 for integers, and NumPy's order of additions depends on a row's place.
        return total + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def rounded(value, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 to the nearest value of DTYPE (bfloat16 or float32), ties to even."""
    if DTYPE.is_fp32():
        return value
    if INTERPRETED:
        # The interpreter rounds ties up, and loses the carry from 1.99999 to 2.
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value != value, 0x7FC0, nearest).to(tl.uint16).to(DTYPE, bitcast=True)
    return value.to(DTYPE)
