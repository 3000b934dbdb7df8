"""The activation kernel against its definition, `engine.activation.apply_activation`."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.activation import MODE_CODE, Activation, ActivationMode, ActivationRows, PositiveBranch, apply_activation
from engine.kernels.cpu.activation import activate
from engine.kernels.cpu.backend import as_array
from engine.philox import STREAM_ACTIVATION, random_words
from tests.engine.draws import UNCORRELATED_VARIANTS
from tests.engine.kernels.threads import numba_threads
from tests.engine.steps import activation_rows, select

DTYPES = [torch.float32, torch.bfloat16]
MIXTURE = [
    Activation(),
    *(Activation(ActivationMode.STOCHASTIC, p=p, seed=seed) for seed, p in enumerate((0, 0.3, 0.8, 1), start=-1)),
    Activation(ActivationMode.RELU),
]
# The kernel rounds once to the type of its output; its SILU differs from the library's by a few units of float32.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}


@dataclass
class Result:
    out: Tensor
    zeros: list[int]


def mixed_rows(count: int, branch: PositiveBranch) -> ActivationRows:
    return activation_rows(
        [MIXTURE[row % len(MIXTURE)] for row in range(count)], [7 * row for row in range(count)], branch
    )


def gate_and_up(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * size)
    gate, up = 3 * torch.randn(2, rows, size, generator=generator)
    gate[:, ::11] = 0.0
    gate[:, ::13] = -0.0
    return gate.to(dtype), up.to(dtype)


def run(
    gate: Tensor, rows: ActivationRows, layer: int, up: Tensor | None = None, out: torch.dtype | None = None
) -> Result:
    """Run the kernel; without `up` it leaves out the product."""
    result = torch.full_like(gate, torch.nan, dtype=out or gate.dtype)
    zeros = np.full(gate.shape[0], -1, np.int64)
    activate(
        as_array(gate),
        rows.threshold.numpy(),
        rows.keys.numpy(),
        rows.positions.numpy(),
        (rows.mode == MODE_CODE[ActivationMode.SILU]).numpy(),
        layer,
        rows.positive_branch is PositiveBranch.IDENTITY,
        as_array(gate[:, :0] if up is None else up),
        as_array(result),
        zeros,
    )
    return Result(result, zeros.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("branch", PositiveBranch)
@pytest.mark.parametrize("size", [1, 3, 4, 66, 128, 1537])
@pytest.mark.parametrize("count", [0, 1, 3, 33])
class TestAgainstTheDefinition:
    def test_masks_are_identical_and_values_agree(
        self, count: int, size: int, branch: PositiveBranch, dtype: torch.dtype
    ) -> None:
        gate, _ = gate_and_up(count, size, dtype)
        rows = mixed_rows(count, branch)
        expected = apply_activation(gate.float(), rows, 5)

        found = run(gate, rows, 5)

        assert torch.equal(found.out == 0, expected == 0)
        torch.testing.assert_close(found.out.float(), expected, rtol=TOLERANCE[dtype], atol=0)

    def test_fused_with_the_product_by_up(
        self, count: int, size: int, branch: PositiveBranch, dtype: torch.dtype
    ) -> None:
        gate, up = gate_and_up(count, size, dtype)
        rows = mixed_rows(count, branch)
        activated = apply_activation(gate.float(), rows, 5)

        found = run(gate, rows, 5, up)

        torch.testing.assert_close(found.out.float(), activated * up.float(), rtol=TOLERANCE[dtype], atol=0)

    def test_zeros_are_counted_before_the_product(
        self, count: int, size: int, branch: PositiveBranch, dtype: torch.dtype
    ) -> None:
        gate, up = gate_and_up(count, size, dtype)
        rows = mixed_rows(count, branch)
        expected = (apply_activation(gate.float(), rows, 5) == 0).sum(-1).tolist()

        assert run(gate, rows, 5).zeros == expected
        assert run(gate, rows, 5, torch.zeros_like(up)).zeros == expected


@pytest.mark.parametrize("branch", PositiveBranch)
def test_from_bfloat16_to_float32_for_the_sparse_path(branch: PositiveBranch) -> None:
    gate, _ = gate_and_up(6, 100, torch.bfloat16)
    rows = mixed_rows(6, branch)

    found = run(gate, rows, 0, out=torch.float32)

    torch.testing.assert_close(found.out, apply_activation(gate.float(), rows, 0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("branch", PositiveBranch)
def test_a_row_is_bit_identical_alone_and_in_a_batch(branch: PositiveBranch, dtype: torch.dtype) -> None:
    gate, up = gate_and_up(33, 131, dtype)
    rows = mixed_rows(33, branch)
    together = run(gate, rows, 2, up)

    for row in range(33):
        at = slice(row, row + 1)
        alone = run(gate[at].clone(), select(rows, at), 2, up[at].clone())
        assert torch.equal(alone.out, together.out[at])
        assert alone.zeros == together.zeros[at]


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_the_bits(dtype: torch.dtype) -> None:
    gate, up = gate_and_up(33, 131, dtype)
    rows = mixed_rows(33, PositiveBranch.IDENTITY)
    with numba_threads(1):
        one = run(gate, rows, 2, up)
    with numba_threads(2):
        two = run(gate, rows, 2, up)

    assert torch.equal(one.out, two.out)
    assert one.zeros == two.zeros


def test_p_1_equals_silu_and_p_0_equals_relu_bit_for_bit() -> None:
    gate, up = gate_and_up(1, 300, torch.float32)
    silu, never, always, relu = (
        run(gate, activation_rows([activation], [3]), 0, up).out
        for activation in (MIXTURE[0], MIXTURE[1], MIXTURE[4], MIXTURE[5])
    )

    assert torch.equal(always, silu)
    assert torch.equal(never, relu)


@pytest.mark.parametrize("neuron", [0, 3, 6])
def test_a_word_passes_below_the_threshold_and_not_at_it(neuron: int) -> None:
    drawn = activation_rows([MIXTURE[2]] * 2, [4, 4])
    word = random_words(drawn.keys, drawn.positions, 1, 7, STREAM_ACTIVATION)[0, neuron]
    rows = replace(drawn, threshold=torch.stack((word, word + 1)))
    gate = torch.full((2, 7), -1.0)

    for out in (run(gate, rows, 1).out, apply_activation(gate, rows, 1)):
        assert (out[:, neuron] != 0).tolist() == [False, True]


@pytest.mark.parametrize("branch", PositiveBranch)
def test_huge_gate_values(branch: PositiveBranch) -> None:
    gate = torch.tensor([[-1e6, -1e4, -104.0, -89.0, -60.0, 60.0, 89.0, 104.0, 1e4, 3e38]]).repeat(len(MIXTURE), 1)
    rows = mixed_rows(len(MIXTURE), branch)

    found = run(gate, rows, 0)

    # The kernel's exponential ends at exp(88): SILU(-1e6) is -6e-33 instead of 0.
    torch.testing.assert_close(found.out, apply_activation(gate, rows, 0), rtol=1e-6, atol=1e-32)


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.7, 0.8, 0.95])
@pytest.mark.parametrize("seed", [1, -12345])
def test_share_of_negative_values_that_pass_is_p(p: float, seed: int) -> None:
    """Within 4 standard errors."""
    rows = activation_rows([Activation(ActivationMode.STOCHASTIC, p=p, seed=seed)] * 32, range(32))

    found = run(torch.full((32, 2048), -1.0), rows, 3)

    elements = found.out.numel()
    share = 1 - sum(found.zeros) / elements
    assert abs(share - p) < 4 * (p * (1 - p) / elements) ** 0.5


@pytest.mark.parametrize("variants", UNCORRELATED_VARIANTS)
def test_draws_are_uncorrelated(variants: list[dict[str, int]]) -> None:
    """Within 4 standard errors."""

    def mask(layer: int = 0, first: int = 0, sample: int = 0, seed: int = 1) -> Tensor:
        activation = Activation(ActivationMode.STOCHASTIC, p=0.5, seed=seed)
        rows = activation_rows([activation] * 32, range(first, first + 32), samples=[sample] * 32)
        return (run(torch.full((32, 2048), -1.0), rows, layer).out != 0).double().flatten()

    masks = torch.stack([mask(**variant) for variant in variants])

    correlations = torch.corrcoef(masks) - torch.eye(len(masks))

    assert correlations.abs().max() < 4 / masks.shape[1] ** 0.5
