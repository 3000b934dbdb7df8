"""The activation kernel against its definition, `engine.activation.apply_activation`."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.activation import MODE_CODE, Activation, ActivationMode, ActivationRows, PositiveBranch, apply_activation
from engine.kernels.cpu.activation import activate
from engine.kernels.cpu.product import BLOCK
from engine.philox import STREAM_ACTIVATION, random_words
from tests.engine.draws import UNCORRELATED_VARIANTS
from tests.engine.steps import activation_rows

MIXTURE = [
    Activation(),
    *(Activation(ActivationMode.STOCHASTIC, p=p, seed=seed) for seed, p in enumerate((0, 0.3, 0.8, 1), start=-1)),
    Activation(ActivationMode.RELU),
]
TOLERANCE = 1e-6  # the kernel's SILU differs from the library's by a few units of float32


@dataclass
class Result:
    out: Tensor
    zeros: list[int]
    kept: list[int]


def mixed_rows(count: int, branch: PositiveBranch) -> ActivationRows:
    return activation_rows(
        [MIXTURE[row % len(MIXTURE)] for row in range(count)], [7 * row for row in range(count)], branch
    )


def gate_values(rows: int, size: int) -> Tensor:
    gate = 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(rows * size))
    gate[:, ::11] = 0.0
    gate[:, ::13] = -0.0
    return gate


def run(gate: Tensor, rows: ActivationRows, layer: int, block: int = BLOCK) -> Result:
    """Run the kernel on every row, some neurons at a time; what lies beside them in memory must stay."""
    out, zeros, kept = gate.clone(), [], []
    is_silu = (rows.mode == MODE_CODE[ActivationMode.SILU]).numpy()
    for row, values in enumerate(out.numpy()):
        counts = np.zeros(2, np.int64)
        for first in range(0, values.size, block):
            counts += activate(
                values[first : first + block],
                first,
                rows.threshold[row].item(),
                *rows.keys[row].tolist(),
                rows.positions[row].item(),
                is_silu[row],
                layer,
                rows.positive_branch is PositiveBranch.IDENTITY,
                np.empty(block, np.uint32),
            )
        zeros.append(int(counts[0]))
        kept.append(int(counts[1]))
    return Result(out, zeros, kept)


@pytest.mark.parametrize("branch", PositiveBranch)
@pytest.mark.parametrize("size", [4, 32, 36, 64, 1536])
@pytest.mark.parametrize("count", [1, 3, 33])
class TestAgainstTheDefinition:
    def test_masks_are_identical_and_values_agree(self, count: int, size: int, branch: PositiveBranch) -> None:
        gate, rows = gate_values(count, size), mixed_rows(count, branch)
        expected = apply_activation(gate, rows, 5)

        found = run(gate, rows, 5)

        assert torch.equal(found.out == 0, expected == 0)
        torch.testing.assert_close(found.out, expected, rtol=TOLERANCE, atol=0)

    def test_zeros_are_counted(self, count: int, size: int, branch: PositiveBranch) -> None:
        gate, rows = gate_values(count, size), mixed_rows(count, branch)

        assert run(gate, rows, 5).zeros == (apply_activation(gate, rows, 5) == 0).sum(-1).tolist()

    def test_what_stochastic_rows_kept_is_counted(self, count: int, size: int, branch: PositiveBranch) -> None:
        gate, rows = gate_values(count, size), mixed_rows(count, branch)
        stochastic = rows.mode == MODE_CODE[ActivationMode.STOCHASTIC]

        expected = (apply_activation(gate, rows, 5) < 0).sum(-1) * stochastic

        assert run(gate, rows, 5).kept == expected.tolist()


@pytest.mark.parametrize("branch", PositiveBranch)
@pytest.mark.parametrize("block", [4, 12, 64, 1536])
def test_the_bits_do_not_depend_on_how_neurons_are_cut(block: int, branch: PositiveBranch) -> None:
    gate, rows = gate_values(6, 1536), mixed_rows(6, branch)

    found, expected = run(gate, rows, 2, block), run(gate, rows, 2)

    assert torch.equal(found.out, expected.out)
    assert found.zeros == expected.zeros


def test_p_1_equals_silu_and_p_0_equals_relu_bit_for_bit() -> None:
    gate = gate_values(1, 320)
    silu, never, always, relu = (
        run(gate, activation_rows([activation], [3]), 0).out
        for activation in (MIXTURE[0], MIXTURE[1], MIXTURE[4], MIXTURE[5])
    )

    assert torch.equal(always, silu)
    assert torch.equal(never, relu)


@pytest.mark.parametrize("neuron", [0, 3, 6, 37])
def test_a_word_passes_below_the_threshold_and_not_at_it(neuron: int) -> None:
    drawn = activation_rows([MIXTURE[2]] * 2, [4, 4])
    word = random_words(drawn.keys, drawn.positions, 1, 40, STREAM_ACTIVATION)[0, neuron]
    rows = replace(drawn, threshold=torch.stack((word, word + 1)))
    gate = torch.full((2, 40), -1.0)

    for out in (run(gate, rows, 1).out, apply_activation(gate, rows, 1)):
        assert (out[:, neuron] != 0).tolist() == [False, True]


@pytest.mark.parametrize("branch", PositiveBranch)
def test_huge_gate_values(branch: PositiveBranch) -> None:
    gate = torch.tensor([[-1e6, -1e4, -104.0, -89.0, -60.0, -1.0, 1.0, 60.0, 89.0, 104.0, 1e4, 3e38]])
    rows = mixed_rows(len(MIXTURE), branch)

    found = run(gate.repeat(len(MIXTURE), 1), rows, 0)

    # The kernel's exponential ends at exp(88): SILU(-1e6) is -6e-33 instead of 0.
    expected = apply_activation(gate.repeat(len(MIXTURE), 1), rows, 0)
    torch.testing.assert_close(found.out, expected, rtol=TOLERANCE, atol=1e-32)


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
