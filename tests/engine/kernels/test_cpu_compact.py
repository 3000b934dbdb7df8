"""Copies of scattered neurons: products with them are products with the neurons where they are."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor

from engine.kernels.cpu.compact import compacted, copy_neurons
from engine.kernels.cpu.formats import as_array
from engine.kernels.cpu.product import BLOCK
from engine.kernels.cpu.quantised import quantise_int4, quantise_int8
from tests.engine.kernels.kinds import normal

NEURONS, SIZE = 96, 128


def _flat(weight: Tensor) -> Any:
    return as_array(weight).reshape(-1)


def _layer(quantise: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def store(weight: Tensor) -> Any:
        stacked = quantise(weight[None])
        return type(stacked)(*(part[0] for part in stacked))

    return store


FORMATS = {
    "float32": _flat,
    "bfloat16": lambda weight: _flat(weight.bfloat16()),
    "int8": _layer(quantise_int8),
    "int4": _layer(quantise_int4),
}
every_format = pytest.mark.parametrize("store", FORMATS.values(), ids=FORMATS)


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


@every_format
def test_a_full_copy_is_the_weight_of_these_neurons(store: Callable[[Tensor], Any]) -> None:
    weight = normal(NEURONS, SIZE, seed=1)
    places = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(2))[:BLOCK]

    copy, memory = copied(store(weight), places.tolist())

    for found, expected in zip(parts_of(copy), parts_of(store(weight[places])), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
        assert np.shares_memory(found, memory)
    assert not memory[-64:].any()


@every_format
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 31])
def test_fewer_neurons_come_first(count: int, store: Callable[[Tensor], Any]) -> None:
    weight = normal(NEURONS, SIZE, seed=1)
    places = list(range(5, 5 + 2 * count, 2))

    copy, _ = copied(store(weight), places)

    expected = torch.zeros(BLOCK, SIZE)
    expected[:count] = weight[places]
    for found, part in zip(parts_of(copy), parts_of(store(expected)), strict=True):
        # Zeros have scale 0 in every format, and what is not written is 0 here.
        np.testing.assert_array_equal(found, part)
