"""The activation kernel against its definition, and its lists of active neurons."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from engine.activation import Activation, ActivationRows, PositiveBranch, apply_activation
from engine.kernels.triton.activation import NEURONS, ActiveNeurons, activate, zero_counts_part
from engine.philox import STREAM_ACTIVATION, random_words
from tests.engine.kernels.triton.blocks import MIXTURE, mixed_rows, relu_rows
from tests.engine.kernels.triton.devices import DEVICE, ROWS, on_device
from tests.engine.steps import activation_rows

TOLERANCE = 1e-6  # the kernel's SILU differs from the library's by a few units of float32


@dataclass
class Result:
    out: Tensor
    zeros: list[int]
    active: ActiveNeurons


def gate_values(rows: int, size: int) -> Tensor:
    gate = 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(rows * size))
    gate[:, ::11] = 0.0
    gate[:, ::13] = -0.0
    return gate


def run(gate: Tensor, rows: ActivationRows, layer: int) -> Result:
    """Run the kernel on gate values [rows, size] or on their split sums [splits, rows, size]."""
    sums = (gate if gate.dim() == 3 else gate[None]).to(DEVICE).contiguous()
    _, count, size = sums.shape
    shape, dtype = zero_counts_part(count, size)
    out, counts = torch.empty(count, size, device=DEVICE), torch.empty(shape, dtype=dtype, device=DEVICE)
    parts = ActiveNeurons.parts(count, size)
    active = ActiveNeurons(*(torch.full(shape, 99, dtype=dtype, device=DEVICE) for shape, dtype in parts))
    activate(sums, on_device(rows), layer, out=out, zero_counts=counts, active=active)
    return Result(out.cpu(), counts.sum(0).tolist(), active)


@pytest.mark.parametrize("branch", PositiveBranch)
@pytest.mark.parametrize("size", [4, 100, 300])
@pytest.mark.parametrize("count", ROWS)
class TestAgainstTheDefinition:
    def test_masks_are_identical_and_values_agree(self, count: int, size: int, branch: PositiveBranch) -> None:
        gate, rows = gate_values(count, size), mixed_rows(count, branch)
        expected = apply_activation(gate, rows, 5)

        found = run(gate, rows, 5)

        assert torch.equal(found.out == 0, expected == 0)
        torch.testing.assert_close(found.out, expected, rtol=TOLERANCE, atol=0)
        assert found.zeros == (expected == 0).sum(-1).tolist()


def test_p_1_equals_silu_and_p_0_equals_relu_bit_for_bit() -> None:
    gate = gate_values(1, 320)
    silu, never, _, always, relu = (run(gate, activation_rows([activation], [3]), 0).out for activation in MIXTURE)

    assert torch.equal(always, silu)
    assert torch.equal(never, relu)


@pytest.mark.parametrize("neuron", [0, 3, 6, 37])
def test_a_word_passes_below_the_threshold_and_not_at_it(neuron: int) -> None:
    drawn = activation_rows([MIXTURE[2]] * 2, [4, 4])
    word = random_words(drawn.keys, drawn.positions, 1, 40, STREAM_ACTIVATION)[0, neuron]
    rows = replace(drawn, threshold=torch.stack((word, word + 1)))

    out = run(torch.full((2, 40), -1.0), rows, 1).out

    assert (out[:, neuron] != 0).tolist() == [False, True]


def test_draws_differ_by_layer_as_the_definition_says() -> None:
    rows, gate = activation_rows([MIXTURE[2]], [9]), torch.full((1, 256), -1.0)

    masks = [(run(gate, rows, layer).out != 0).tolist() for layer in (0, 1, 16)]

    assert masks == [(apply_activation(gate, rows, layer) != 0).tolist() for layer in (0, 1, 16)]
    assert masks[0] != masks[1] != masks[2]


def test_a_row_has_the_same_bits_beside_others_and_alone() -> None:
    gate, rows = gate_values(70, 100), mixed_rows(70)
    whole = run(gate, rows, 2).out

    for row in (0, 2, 64, 69):
        alone = ActivationRows(
            rows.mode[[row]], rows.threshold[[row]], rows.keys[[row]], rows.positions[[row]], rows.positive_branch
        )
        assert torch.equal(run(gate[[row]], alone, 2).out, whole[[row]])


def test_split_sums_are_added_in_order() -> None:
    sums = torch.tensor([2.0**24, 1.0, -(2.0**24) + 2])[:, None, None].expand(3, 1, 8)

    assert run(sums, activation_rows([Activation()], [0]), 0).out.tolist() == [
        [pytest.approx(2 / (1 + 2.71828**-2))] * 8
    ]


@pytest.mark.parametrize("branch", PositiveBranch)
def test_huge_gate_values(branch: PositiveBranch) -> None:
    gate = torch.tensor([[-1e6, -1e4, -104.0, -89.0, -60.0, -1.0, 1.0, 60.0, 89.0, 104.0, 1e4, 3e38]])
    rows = mixed_rows(len(MIXTURE), branch)

    found = run(gate.repeat(len(MIXTURE), 1), rows, 0)

    # A GPU's exponential is less exact the further away from 0.
    tolerance = 1e-5 if DEVICE.type == "cuda" else TOLERANCE
    # Below -88 exponentials are denormal, and flushed to 0 by one library and not by another.
    expected = apply_activation(gate.repeat(len(MIXTURE), 1), rows, 0)
    torch.testing.assert_close(found.out, expected, rtol=tolerance, atol=1e-32)


class TestActiveNeurons:
    @staticmethod
    def listed(active: ActiveNeurons, tile: int) -> list[int]:
        blocks = active.neurons[tile].unflatten(0, (-1, NEURONS)).tolist()
        return [
            neuron
            for block, count in zip(blocks, active.counts[tile].tolist(), strict=True)
            for neuron in block[:count]
        ]

    @pytest.mark.parametrize("size", [4, 128, 300])
    @pytest.mark.parametrize("count", [1, 3, 64, 70])
    def test_are_those_of_any_row_of_a_tile(self, count: int, size: int) -> None:
        gate = gate_values(count, size) - 3

        found = run(gate, relu_rows(count), 0)

        for tile in range(len(found.active.flags)):
            used = (found.out[64 * tile : 64 * tile + 64] != 0).any(0)
            assert torch.equal(found.active.flags[tile].cpu(), used.to(torch.uint8))
            assert self.listed(found.active, tile) == used.nonzero().flatten().tolist()

    @pytest.mark.parametrize("sign", [-1.0, 1.0])
    def test_may_be_none_or_all(self, sign: float) -> None:
        found = run(torch.full((3, 300), sign), relu_rows(3), 0)
        assert self.listed(found.active, 0) == ([] if sign < 0 else [*range(300)])

    def test_a_nan_is_active_and_stays_in_its_row(self) -> None:
        gate = torch.full((2, 8), -1.0)
        gate[1, 5] = torch.nan

        found = run(gate, relu_rows(2), 0)

        assert self.listed(found.active, 0) == [5]
        assert found.out[1].isnan().tolist() == [neuron == 5 for neuron in range(8)]
        assert (found.out[0] == 0).all()


def test_bad_input_is_refused_by_name() -> None:
    gate, rows = torch.zeros(1, 2, 8, device=DEVICE), on_device(relu_rows(3))
    with pytest.raises(ValueError, match=r"rows\.mode must have shape \[2\], got \[3\]"):
        activate(gate, rows, 0, out=gate[0], zero_counts=torch.empty(1, 2, dtype=torch.int32, device=DEVICE))
