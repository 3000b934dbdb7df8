"""The scalar functions and vector loops that the CPU kernels are made of."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from numpy.typing import NDArray

from engine.kernels.cpu.formats import as_array
from engine.kernels.cpu.isa import features
from engine.kernels.cpu.math import MAX_EXPONENT, MIN_EXPONENT, exp, from_bfloat16, narrow, silu, to_bfloat16, widen
from engine.kernels.cpu.options import OPTIONS
from engine.kernels.cpu.rows import add_chunk, multiply_chunk, narrow_chunk, narrow_vector
from engine.kernels.cpu.simd import (
    HEADS,
    dot,
    exponentials,
    transposed_dots16,
    vector_max,
    vector_sum,
    weighted_rows16,
)

Array = NDArray[Any]
DTYPES = [torch.float32, torch.bfloat16]
BLOCKS = [1, 2, 3, 4, 5, 7, 8, 36]  # of 16 lanes: below, at and beyond the four partial sums


# Intrinsics can be called from compiled code only.


@njit
def call_dot(x, x_at, row, row_at, size):  # type: ignore[no-untyped-def]
    return dot(x, x_at, row, row_at, size)


@njit
def call_vector_sum(values, at, size):  # type: ignore[no-untyped-def]
    return vector_sum(values, at, size)


@njit
def call_transposed_dots16(heads, out, out_at, stride, query, query_at, keys, keys_at, size):  # type: ignore[no-untyped-def]
    transposed_dots16(heads, out, out_at, stride, query, query_at, keys, keys_at, size)


@njit
def call_weighted_rows16(heads, out, out_at, apart, weights, weights_at, rows, rows_at, stride, count):  # type: ignore[no-untyped-def]
    weighted_rows16(heads, out, out_at, apart, weights, weights_at, count, rows, rows_at, stride, count)


@njit
def call_vector_max(values, at, size):  # type: ignore[no-untyped-def]
    return vector_max(values, at, size)


@njit
def call_exponentials(out, out_at, stride, values, at, size, top):  # type: ignore[no-untyped-def]
    return exponentials(out, out_at, stride, values, at, size, top)


@njit
def call_narrow(out, at, values, values_at, whole):  # type: ignore[no-untyped-def]
    if whole:
        narrow_chunk(out, at, values, values_at)
    else:
        narrow_vector(out, at, values, values_at)


@njit
def call_chunks(sums, products, at, values, values_at):  # type: ignore[no-untyped-def]
    add_chunk(sums, at, values, values_at)
    multiply_chunk(products, at, values, values_at)


@njit
def map_exp(x, out):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        out[i] = exp(x[i])


@njit
def map_silu(x, out):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        out[i] = silu(x[i])


@njit
def map_convert(source, out):  # type: ignore[no-untyped-def]
    for i in range(source.size):
        out[i] = narrow(widen(source[i]), out)  # type: ignore[no-untyped-call]


def small_integers(size: int, seed: int) -> Array:
    """Values whose products and sums are exact in float32, in any order, and which bfloat16 can hold."""
    return np.random.default_rng(seed).integers(-8, 9, size).astype(np.float32)


def weights(values: Array, dtype: torch.dtype) -> Array:
    return as_array(torch.from_numpy(values).to(dtype))


def fenced(values: Array, before: int = 3, after: int = 5) -> Array:
    """The values between others that must not be used."""
    return np.concatenate((np.full(before, np.nan), values, np.full(after, np.nan))).astype(np.float32)


def ulps(found: Array, exact: Array) -> float:
    return float(np.max(np.abs(found - exact) / np.spacing(np.abs(exact).astype(np.float32))))


class TestMath:
    def test_exp_is_accurate_to_2_units_in_the_last_place(self) -> None:
        random = np.random.default_rng(0)
        special = np.array([MIN_EXPONENT, MAX_EXPONENT, 0.0, -0.0, 1e-8])
        x = np.concatenate((special, random.uniform(-87, 88, 200_000), random.normal(size=50_000))).astype(np.float32)
        out = np.empty_like(x)

        map_exp(x, out)

        assert ulps(out, np.exp(x.astype(np.float64))) <= 2
        assert out[2] == out[3] == 1

    def test_exp_is_clamped(self) -> None:
        x = np.array([-88, -1e30, -np.inf, 89, 1e30, np.inf], np.float32)
        out, ends = np.empty_like(x), np.empty(2, np.float32)

        map_exp(x, out)
        map_exp(np.array([MIN_EXPONENT, MAX_EXPONENT]), ends)

        assert out.tolist() == [ends[0]] * 3 + [ends[1]] * 3
        assert 0 < ends[0] < ends[1] < np.inf

    def test_silu(self) -> None:
        x = np.concatenate(([0.0, -0.0], np.linspace(-80, 80, 100_001))).astype(np.float32)
        wide = x.astype(np.float64)
        out = np.empty_like(x)

        map_silu(x, out)

        np.testing.assert_allclose(out, wide / (1 + np.exp(-wide)), rtol=5e-7, atol=0)
        assert np.array_equal(np.signbit(out), np.signbit(x))

    def test_silu_of_huge_values(self) -> None:
        x = np.array([-1e30, -1e4, -100, 100, 1e4, 1e30], np.float32)
        out = np.empty_like(x)

        map_silu(x, out)

        assert out[3:].tolist() == x[3:].tolist()
        assert np.all(np.abs(out[:3] / x[:3]) < 1e-37)

    def test_every_bfloat16_is_widened_exactly(self) -> None:
        bits = np.arange(2**16, dtype=np.uint16)
        out = np.empty(2**16, np.float32)

        map_convert(bits, out)

        expected = torch.from_numpy(bits).view(torch.bfloat16).float().numpy()
        np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))

    def test_every_bfloat16_survives_the_round_trip(self) -> None:
        bits = np.arange(2**16, dtype=np.uint16)
        numbers = bits[~np.isnan(torch.from_numpy(bits).view(torch.bfloat16).float().numpy())]
        out = np.empty_like(numbers)

        map_convert(numbers, out)

        np.testing.assert_array_equal(out, numbers)

    def test_rounding_to_bfloat16_equals_pytorch(self) -> None:
        random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
        upper = np.random.default_rng(1).integers(0, 2**16, 3000).astype(np.uint32) << 16
        ties = np.concatenate([upper | low for low in (0x7FFF, 0x8000, 0x8001)])  # half-way, and just beside
        bits = np.concatenate((random, ties, [0, 1 << 31, 0x7F7FFFFF, 0x7F800000, 0xFF800000])).astype(np.uint32)
        x = bits.view(np.float32)
        x = x[~np.isnan(x)]
        out = np.empty(x.size, np.uint16)

        map_convert(x, out)

        np.testing.assert_array_equal(out, weights(x, torch.bfloat16))

    @pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF])
    def test_nan_stays_nan(self, bits: int) -> None:
        rounded = to_bfloat16(np.array([bits], np.uint32).view(np.float32)[0])

        assert np.isnan(from_bfloat16(np.uint16(rounded)))

    def test_float32_is_passed_through(self) -> None:
        x = np.array([0.1, -3.0, np.inf], np.float32)
        out = np.empty_like(x)

        map_convert(x, out)

        assert out.tolist() == x.tolist()


class TestVectors:
    """Whole vectors at a time, between values that must not be touched."""

    @pytest.mark.parametrize("blocks", BLOCKS)
    def test_vector_max(self, blocks: int) -> None:
        values = np.random.default_rng(blocks).normal(size=16 * blocks).astype(np.float32) - 5

        for place in (0, 7, 16 * blocks - 1):
            values[place] = values.max() + 1
            outside = np.concatenate(([np.inf], values, [np.inf])).astype(np.float32)
            assert call_vector_max(outside, 1, values.size) == values[place]

    @pytest.mark.parametrize("blocks", BLOCKS)
    def test_exponentials(self, blocks: int) -> None:
        values = np.random.default_rng(blocks).uniform(-90, 3, 16 * blocks).astype(np.float32)
        values[::5] = -np.inf
        out = np.full((blocks, 20), 7, np.uint16)

        total = call_exponentials(out.reshape(-1), 2, 20, fenced(values), 3, values.size, np.float32(3))

        exact = np.exp(values.astype(np.float64) - 3)
        exact[values - 3 < -87] = 0
        found = torch.from_numpy(out[:, 2:18].copy()).view(torch.bfloat16).double().numpy().ravel()
        np.testing.assert_allclose(found, exact, rtol=2.0**-8 + 1e-6, atol=0)
        np.testing.assert_allclose(total, exact.sum(), rtol=1e-6)
        assert (out[:, :2] == 7).all()
        assert (out[:, 18:] == 7).all()

    @pytest.mark.parametrize("place", [0, 20])
    def test_what_is_not_a_number_stays_so(self, place: int) -> None:
        values = np.zeros(32, np.float32)
        values[place] = np.nan
        out = np.empty(32, np.uint16)

        total = call_exponentials(out, 0, 16, values, 0, 32, np.float32(0))

        assert np.isnan(total)
        assert np.flatnonzero(torch.from_numpy(out).view(torch.bfloat16).isnan().numpy()).tolist() == [place]

    @pytest.mark.parametrize("whole", [True, False])
    def test_narrowing_equals_that_of_scalars(self, whole: bool) -> None:
        size = 32 if whole else 16
        bits = np.random.default_rng(0).integers(0, 2**32, 64 * size, dtype=np.uint32)
        bits[::7] = bits[::7] & 0xFFFF0000 | 0x8000  # half-way
        bits[:6] = 0, 1 << 31, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001
        values = bits.view(np.float32)
        out, expected = np.zeros((2, values.size + 4), np.uint16)

        for at in range(0, values.size, size):
            call_narrow(out, at + 2, values, at, whole)
        map_convert(values, expected[2:-2])

        np.testing.assert_array_equal(out, expected)

    def test_chunks_are_added_and_multiplied_in_place(self) -> None:
        before, values = small_integers(32, 1), small_integers(32, 2)
        sums, products = fenced(before), fenced(before)

        call_chunks(sums, products, 3, fenced(values, before=6), 6)

        np.testing.assert_array_equal(sums, fenced(before + values))
        np.testing.assert_array_equal(products, fenced(before * values))


@pytest.mark.parametrize("dtype", DTYPES)
class TestLoops:
    """Small integers make every order of summation exact, so results are equal, not close."""

    @pytest.mark.parametrize("blocks", BLOCKS)
    def test_dot(self, dtype: torch.dtype, blocks: int) -> None:
        size = 16 * blocks
        x, row = small_integers(size, 1), small_integers(size, 2)

        assert call_dot(fenced(x), 3, weights(fenced(row, before=7), dtype), 7, size) == x @ row

    @pytest.mark.parametrize("heads", range(1, HEADS + 1))
    @pytest.mark.parametrize("size", [4, 8, 16, 64, 80])
    def test_transposed_dots16(self, dtype: torch.dtype, size: int, heads: int) -> None:
        queries, keys = small_integers(size * heads, 1), small_integers(size * 16, 2)
        out = fenced(np.zeros(16 * heads, np.float32))

        call_transposed_dots16(
            heads, out, 3, 16, fenced(queries, before=2), 2, weights(fenced(keys, before=9), dtype), 9, size
        )

        np.testing.assert_array_equal(out, fenced((queries.reshape(heads, size) @ keys.reshape(size, 16)).ravel()))

    @pytest.mark.parametrize("heads", range(1, HEADS + 1))
    @pytest.mark.parametrize("count", [0, 1, 2, 15, 16])
    @pytest.mark.parametrize("stride", [16, 48])
    def test_weighted_rows16_reads_the_counted_rows_only(
        self, dtype: torch.dtype, count: int, stride: int, heads: int
    ) -> None:
        rows = np.full((16, stride), np.nan, np.float32)
        rows[:count, :16] = small_integers(16 * count, 1).reshape(count, 16)
        factors, before = small_integers(count * heads, 2), small_integers(16 * heads, 3)
        out = fenced(before)

        call_weighted_rows16(
            heads, out, 3, 16, fenced(factors), 3, weights(fenced(rows.ravel()), dtype), 3, stride, count
        )

        expected = before.reshape(heads, 16) + factors.reshape(heads, count) @ rows[:count, :16]
        np.testing.assert_array_equal(out, fenced(expected.ravel()))


@pytest.mark.parametrize("blocks", BLOCKS)
def test_vector_sum(blocks: int) -> None:
    values = small_integers(16 * blocks, 1)

    assert call_vector_sum(fenced(values), 3, 16 * blocks) == values.sum()


@settings(deadline=None)
@given(blocks=st.integers(1, 12), seed=st.integers(0, 1000))
def test_dot_of_real_numbers_is_close(blocks: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x, row = random.normal(size=(2, 16 * blocks)).astype(np.float32)

    found = call_dot(x, 0, row, 0, x.size)

    exact = x.astype(np.float64) * row.astype(np.float64)
    assert abs(found - exact.sum()) <= x.size * 2.0**-24 * np.abs(exact).sum()


def called_by_a_kernel(function: Any, options: dict[str, Any], flags: dict[str, Any]) -> NDArray[np.float32]:
    """Results of a function, compiled anew with its own options, for its first caller, which has these flags."""
    again = njit(**options)(function.py_func)

    @njit(**flags)
    def call(x, out):  # type: ignore[no-untyped-def]
        for i in range(x.size):
            out[i] = again(x[i])

    x = np.linspace(-30, 30, 4096, dtype=np.float32)
    out = np.empty_like(x)
    call(x, out)
    return out


def test_bits_do_not_depend_on_the_kernel_that_comes_first() -> None:
    """Numba compiles a function without flags of its own with those of its first caller."""
    fusing = {"fastmath": OPTIONS["fastmath"]}
    own = {name: exp.targetoptions[name] for name in ("forceinline", "fastmath")}

    first_plain, first_fusing = (called_by_a_kernel(exp, own, flags) for flags in ({}, fusing))

    assert np.array_equal(first_plain, first_fusing)
    if "fma" in features():  # the trap is there
        without = {"forceinline": True}
        assert not np.array_equal(called_by_a_kernel(exp, without, {}), called_by_a_kernel(exp, without, fusing))
