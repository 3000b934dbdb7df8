"""Scalar float functions that LLVM can vectorise when Numba inlines them into a loop."""

import numpy as np
from numba import njit, types
from numba.extending import overload

from engine.kernels.cpu.options import OPTIONS
from engine.kernels.cpu.simd import EXP_TERMS, LN2_HIGH, LN2_LOW, LOG2_E, MIN_EXPONENT, bits_to_float, float_to_bits

ONE, HALF = np.float32(1.0), np.float32(0.5)
MAX_EXPONENT = np.float32(88.0)


# Numba compiles a function once, with the flags of the kernel that comes first unless it has its own. Here they decide
# whether a * b + c is fused, and so the last bit: without them it would depend on what was compiled or cached before.
@njit(forceinline=True, fastmath=OPTIONS["fastmath"])
def exp(x):  # type: ignore[no-untyped-def]
    """float32 exponential within 2 units in the last place (Cephes polynomial); clamps to exp(-87) and exp(88)."""
    x = min(max(x, MIN_EXPONENT), MAX_EXPONENT)
    n = np.floor(x * LOG2_E + HALF)
    r = x - n * LN2_HIGH - n * LN2_LOW
    y = EXP_TERMS[0]
    y = y * r + EXP_TERMS[1]
    y = y * r + EXP_TERMS[2]
    y = y * r + EXP_TERMS[3]
    y = y * r + EXP_TERMS[4]
    y = y * r + EXP_TERMS[5]
    y = y * r * r + r + ONE
    return y * bits_to_float(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))


@njit(forceinline=True, fastmath=OPTIONS["fastmath"])
def silu(x):  # type: ignore[no-untyped-def]
    """x * sigmoid(x) in float32."""
    return x / (ONE + exp(-x))


@njit(forceinline=True)
def from_bfloat16(bits):  # type: ignore[no-untyped-def]
    """Widen a bfloat16, seen as uint16, to float32."""
    return bits_to_float(np.uint32(bits) << np.uint32(16))


@njit(forceinline=True)
def to_bfloat16(value):  # type: ignore[no-untyped-def]
    """Round a float32 to the nearest bfloat16 (ties to even), seen as uint16. Infinities stay; NaN stays NaN."""
    bits = float_to_bits(value)
    # Asked of the bits: Numba compiles this with the flags of whichever kernel comes first, which may promise no NaN.
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


def widen(element):  # type: ignore[no-untyped-def]
    """An array element, float32 or bfloat16 bits, as float32 (for use in kernels only)."""
    raise NotImplementedError


@overload(widen)
def _widen(element):  # type: ignore[no-untyped-def]  # Numba compares signatures with the lambdas
    if element == types.uint16:
        return lambda element: from_bfloat16(element)
    return lambda element: element


def narrow(value, array):  # type: ignore[no-untyped-def]
    """A float32 in the element type of `array`, float32 or bfloat16 bits (for use in kernels only)."""
    raise NotImplementedError


@overload(narrow)
def _narrow(value, array):  # type: ignore[no-untyped-def]
    if array.dtype == types.uint16:
        return lambda value, array: to_bfloat16(value)
    return lambda value, array: value
