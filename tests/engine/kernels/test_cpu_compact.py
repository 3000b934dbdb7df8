"""Scattered neurons: their copies for tiles, and products with them, which are those with the whole weight."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor

from engine.kernels.cpu.compact import compacted, copy_neurons, product_listed
from engine.kernels.cpu.formats import Format, as_array, make_rows, tiles_for
from engine.kernels.cpu.isa import has_amx
from engine.kernels.cpu.linear import TILES, prepare
from engine.kernels.cpu.product import BLOCK, product
from engine.kernels.cpu.quantise import quantise_int4, quantise_int8
from engine.kernels.cpu.tiles import configure, release
from tests.engine.kernels.kinds import normal

NEURONS, SIZE = 96, 128


def _bfloat16(weight: Tensor, *, amx: bool) -> Any:
    return as_array(weight.bfloat16()).reshape(-1)


def _layer(quantise: Callable[..., Any]) -> Callable[..., Any]:
    def store(weight: Tensor, *, amx: bool) -> Any:
        stacked = quantise(as_array(weight)[None], amx=amx)
        return type(stacked)(*(part[0] for part in stacked))

    return store


COPIED = {"bfloat16": _bfloat16, "int8": _layer(quantise_int8), "int4": _layer(quantise_int4)}
FORMATS = {"float32": lambda weight, *, amx: as_array(weight).reshape(-1), **COPIED}
every_copied_format = pytest.mark.parametrize("stored", COPIED.values(), ids=COPIED)


@njit
def call_copy(weights, size, places, first, count, memory):  # type: ignore[no-untyped-def]
    copy = compacted(weights, size, memory)
    copy_neurons(weights, size, places, first, count, copy)
    return copy


def parts_of(weights: Any) -> tuple[Any, ...]:
    return weights if isinstance(weights, tuple) else (weights,)


def copied(weights: Any, places: list[int]) -> tuple[Any, Any]:
    """The copy, and the memory that it lies in and ends before."""
    memory = np.zeros(4 * BLOCK * SIZE + 64, np.uint8)
    copy = call_copy(weights, SIZE, np.array([-1, -1, *places, -1]), 2, len(places), memory)
    return copy, memory


@every_copied_format
def test_a_full_copy_is_the_weight_of_these_neurons(stored: Callable[..., Any]) -> None:
    store = partial(stored, amx=True)
    weight = normal(NEURONS, SIZE, seed=1)
    places = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(2))[:BLOCK]

    copy, memory = copied(store(weight), places.tolist())

    for found, expected in zip(parts_of(copy), parts_of(store(weight[places])), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
        assert np.shares_memory(found, memory)
    assert not memory[-64:].any()


@every_copied_format
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 31])
def test_fewer_neurons_come_first(count: int, stored: Callable[..., Any]) -> None:
    store = partial(stored, amx=True)
    weight = normal(NEURONS, SIZE, seed=1)
    places = list(range(5, 5 + 2 * count, 2))

    copy, _ = copied(store(weight), places)

    expected = torch.zeros(BLOCK, SIZE)
    expected[:count] = weight[places]
    for found, part in zip(parts_of(copy), parts_of(store(expected)), strict=True):
        # Zeros have scale 0 in every format, and what is not written is 0 here.
        np.testing.assert_array_equal(found, part)


@njit
def call_listed(inputs, config, rows, weights, places, first, count, memory, out, scratch):  # type: ignore[no-untyped-def]
    if config is not None:
        configure(config)
    copy = compacted(weights, SIZE, memory)
    product_listed(inputs, rows, 0, rows, SIZE, weights, places, first, count, copy, out, 0, BLOCK, scratch)
    if config is not None:
        release()


@njit
def call_whole(inputs, config, rows, weights, out, scratch):  # type: ignore[no-untyped-def]
    if config is not None:
        configure(config)
    for neuron in range(0, NEURONS, BLOCK):
        product(inputs, rows, 0, rows, SIZE, weights, neuron, out, neuron, NEURONS, scratch)
    if config is not None:
        release()


@pytest.mark.parametrize("amx", [False, pytest.param(True, marks=pytest.mark.skipif(not has_amx(), reason="no AMX"))])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 17])
@pytest.mark.parametrize("count", [1, 15, 32])
def test_products_with_listed_neurons_are_those_with_all(count: int, rows: int, name: str, amx: bool) -> None:
    if amx and name == "float32":
        pytest.skip("tiles take no float32")
    kind = {"int8": Format.INT8, "int4": Format.INT4}.get(name, Format.FLOAT)
    weights = FORMATS[name](normal(NEURONS, SIZE, seed=1), amx=amx)
    inputs = make_rows(kind, rows, SIZE, amx=amx)
    prepare(0, 1, normal(rows, SIZE, seed=2).numpy(), np.empty(0, np.float32), np.float32(0), inputs, weights)
    places = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(3))[:count].sort().values.numpy()
    listed = np.full(2 + count + 2 * BLOCK, 10**15)  # what follows is of no neuron
    listed[2 : 2 + count] = places
    config, scratch = tiles_for(kind, rows, amx=amx), np.zeros(TILES, np.float32)
    whole, found = np.full(rows * NEURONS, np.nan, np.float32), np.full(rows * BLOCK, np.nan, np.float32)

    call_whole(inputs, config, rows, weights, whole, scratch)
    call_listed(inputs, config, rows, weights, listed, 2, count, np.zeros(4 * BLOCK * SIZE, np.uint8), found, scratch)

    expected = whole.reshape(rows, NEURONS)[:, places]
    np.testing.assert_array_equal(found.reshape(rows, BLOCK)[:, :count], expected)
    assert np.isfinite(expected).all()
