"""The sparse feed-forward kernel against the dense RELU reference."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.activation import Activation, ActivationMode, PositiveBranch, apply_activation
from engine.kernels.cpu.backend import as_array
from engine.kernels.cpu.sparse_ffn import PARTS, sparse_ffn
from tests.engine.kernels.threads import numba_threads
from tests.engine.steps import activation_rows

DTYPES = [torch.float32, torch.bfloat16]
SPARSITIES = [0.0, 0.25, 0.5, 0.9, 0.99, 1.0]
HIDDEN, INTERMEDIATE = 80, 200  # no multiple of 64, no multiple of PARTS


@dataclass
class Problem:
    """Inputs of the layer; `gate` has exactly the wanted share of negative values in each row."""

    x: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def make(
        cls, rows: int, sparsity: float, dtype: torch.dtype, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE
    ) -> "Problem":
        generator = torch.Generator().manual_seed(1000 * rows + round(100 * sparsity))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        negative = torch.rand(rows, intermediate, generator=generator).argsort(-1) < round(sparsity * intermediate)
        size = normal(rows, intermediate).abs() + 0.1
        up, down = normal(intermediate, hidden) / hidden**0.5, normal(intermediate, hidden) / intermediate**0.5
        return cls(normal(rows, hidden).to(dtype), torch.where(negative, -size, size), up.to(dtype), down.to(dtype))

    def activated(self, branch: PositiveBranch = PositiveBranch.SILU) -> Tensor:
        count = self.gate.shape[0]
        return apply_activation(
            self.gate, activation_rows([Activation(ActivationMode.RELU)] * count, range(count), branch), 0
        )

    def dense(self, branch: PositiveBranch = PositiveBranch.SILU) -> Tensor:
        """The whole layer in float64."""
        return (self.activated(branch).double() * (self.x.double() @ self.up.double().T)) @ self.down.double()


def run(problem: Problem, activated: Tensor) -> Tensor:
    out = torch.full_like(problem.x, torch.nan)
    partial = np.full((PARTS, *problem.x.shape), np.nan, np.float32)
    sparse_ffn(
        problem.x.float().numpy(),
        activated.numpy(),
        as_array(problem.up),
        as_array(problem.down),
        partial,
        as_array(out),
    )
    return out


def assert_close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Sums in float32, then one rounding to `dtype`."""
    assert found.dtype is dtype
    rounding = 2.0**-8 if dtype is torch.bfloat16 else 0.0
    torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("rows", [*range(1, 9), 33])
def test_equals_the_dense_reference(rows: int, sparsity: float, dtype: torch.dtype) -> None:
    problem = Problem.make(rows, sparsity, dtype)
    activated = problem.activated()
    assert ((activated == 0).sum(-1) == round(sparsity * INTERMEDIATE)).all()

    assert_close(run(problem, activated), problem.dense(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_the_identity_branch(dtype: torch.dtype) -> None:
    problem = Problem.make(4, 0.9, dtype)

    found = run(problem, problem.activated(PositiveBranch.IDENTITY))

    assert_close(found, problem.dense(PositiveBranch.IDENTITY), dtype)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 9),
    intermediate=st.integers(1, 70),
    sparsity=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(rows: int, blocks: int, intermediate: int, sparsity: float, dtype: torch.dtype) -> None:
    problem = Problem.make(rows, sparsity, dtype, 16 * blocks, intermediate)

    assert_close(run(problem, problem.activated()), problem.dense(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_active_is_exactly_zero(dtype: torch.dtype) -> None:
    problem = Problem.make(3, 1.0, dtype)

    assert torch.equal(run(problem, problem.activated()), torch.zeros_like(problem.x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_inactive_neurons_are_not_read(dtype: torch.dtype) -> None:
    problem = Problem.make(2, 0.9, dtype)
    activated = problem.activated()
    expected = run(problem, activated)

    unused = (activated == 0).all(0)
    problem.up[unused] = problem.down[unused] = torch.nan

    assert unused.any()
    assert torch.equal(run(problem, activated), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_a_row_is_bit_identical_alone_and_in_a_batch(sparsity: float, dtype: torch.dtype) -> None:
    problem = Problem.make(33, sparsity, dtype)
    activated = problem.activated()
    together = run(problem, activated)

    for row in range(33):
        at = slice(row, row + 1)
        alone = Problem(problem.x[at], problem.gate[at], problem.up, problem.down)
        assert torch.equal(run(alone, activated[at]), together[at])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_the_bits(dtype: torch.dtype) -> None:
    problem = Problem.make(8, 0.5, dtype)
    activated = problem.activated()
    with numba_threads(1):
        one = run(problem, activated)
    with numba_threads(2):
        two = run(problem, activated)

    assert torch.equal(one, two)
