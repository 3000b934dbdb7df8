"""Activations by name."""

import pytest

from engine import Activation, ActivationMode, ActivationSupport
from evaluation.errors import GridError
from evaluation.grid import DEFAULT_GRID, describe, parse_activation, silu_share, supported


@pytest.mark.parametrize("activation", DEFAULT_GRID, ids=describe)
def test_a_description_names_the_activation(activation: Activation) -> None:
    assert parse_activation(describe(activation)) == activation


def test_p_may_be_left_out() -> None:
    assert parse_activation("stochastic") == Activation("stochastic")


@pytest.mark.parametrize("spec", ["", "gelu", "stochastic:", "stochastic:x", "stochastic:1.5", "relu:0.5", "silu:"])
def test_anything_else_is_refused(spec: str) -> None:
    with pytest.raises(GridError, match=r"must be 'silu', 'relu' or 'stochastic:P' with P in \[0, 1\]"):
        parse_activation(spec)


def test_an_untuned_checkpoint_allows_a_part_of_the_grid() -> None:
    assert [describe(each) for each in supported(DEFAULT_GRID, ActivationSupport())] == [
        "silu",
        "stochastic:0.9",
        "stochastic:0.7",
    ]


def test_a_checkpoint_tuned_for_all_modes_allows_all_of_it() -> None:
    support = ActivationSupport(tuple(ActivationMode), min_p=0.0, tuned=True)
    assert supported(DEFAULT_GRID, support) == list(DEFAULT_GRID)


def test_the_grid_goes_from_silu_to_relu() -> None:
    assert [silu_share(each) for each in DEFAULT_GRID] == [1.0, 0.9, 0.7, 0.5, 0.3, 0.0]
