"""The up projection of listed neurons, and its product with the activated gate."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.kernels.triton.activation import NEURONS, ActiveNeurons
from engine.kernels.triton.linear import launch_product
from engine.kernels.triton.tuning import Tile, of_same_splits
from engine.kernels.triton.up import launch_gathered, launch_multiply
from tests.engine.kernels.kinds import normal
from tests.engine.kernels.triton.devices import DEVICE, every_dtype

HIDDEN, INTERMEDIATE = 100, 300
TILE = Tile(block_n=16, block_k=32, splits=3, num_warps=4, num_stages=2)
# The interpreter adds up the inputs that are loaded at once in an order of its own; a GPU always adds one by one.
SKIPPING = [
    of_same_splits(replace(TILE, block_n=block_n, block_k=block_k), TILE)
    for block_n, block_k in ((16, 32), (64, 32), (16, 64), (32, 16))
    if block_k == TILE.block_k or DEVICE.type == "cuda"
]
GARBAGE = 7.0


def neurons_of(lists: list[list[int]]) -> ActiveNeurons:
    """As the activation kernel writes them, one list for each row tile."""
    (flags, neurons, counts) = (
        torch.full(shape, 99, dtype=dtype) for shape, dtype in ActiveNeurons.parts(64 * len(lists), INTERMEDIATE)
    )
    for tile, some in enumerate(lists):
        flags[tile] = 0
        flags[tile, some] = 1
        for block in range(counts.shape[1]):
            own = [neuron for neuron in some if neuron // NEURONS == block]
            counts[tile, block] = len(own)
            neurons[tile, block * NEURONS : block * NEURONS + len(own)] = torch.tensor(own, dtype=torch.int32)
    return ActiveNeurons(flags.to(DEVICE), neurons.to(DEVICE), counts.to(DEVICE))


def products(
    x: Tensor, weight: Tensor, active: ActiveNeurons, whole: bool, skipping: Tile = SKIPPING[0]
) -> tuple[Tensor, Tensor]:
    """Sums of all neurons, and those of listed ones; the rest keeps its garbage."""
    shape = (1 if whole else TILE.split_count(HIDDEN), len(x), INTERMEDIATE)
    dense, sparse = torch.empty(shape, device=DEVICE), torch.full(shape, GARBAGE, device=DEVICE)
    launch_product(x, weight, TILE, dense, whole=whole)
    launch_gathered(x, weight, skipping, active, sparse, whole=whole)
    return dense, sparse


@every_dtype
@pytest.mark.parametrize("skipping", SKIPPING)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "some",
    [[], [0], [299], [*range(300)], [*range(0, 300, 7)], [127, 128, 255, 256], [*range(130, 135)]],
    ids=["none", "first", "last", "all", "each seventh", "ends of blocks", "one block"],
)
def test_listed_neurons_have_the_bits_of_the_whole_product(
    some: list[int], whole: bool, skipping: Tile, dtype: torch.dtype
) -> None:
    x = normal(3, HIDDEN, seed=1, dtype=dtype).to(DEVICE)
    weight = normal(INTERMEDIATE, HIDDEN, seed=2, dtype=dtype).to(DEVICE)

    dense, sparse = products(x, weight, neurons_of([some]), whole, skipping)

    rest = [neuron for neuron in range(INTERMEDIATE) if neuron not in some]
    assert torch.equal(sparse[:, :, some], dense[:, :, some])
    assert (sparse[:, :, rest] == GARBAGE).all()


def test_each_tile_of_rows_has_its_own_list() -> None:
    x, weight = normal(70, HIDDEN, seed=1).to(DEVICE), normal(INTERMEDIATE, HIDDEN, seed=2).to(DEVICE)

    dense, sparse = products(x, weight, neurons_of([[3, 200], [299]]), whole=True)

    assert torch.equal(sparse[:, :64, [3, 200]], dense[:, :64, [3, 200]])
    assert torch.equal(sparse[:, 64:, 299], dense[:, 64:, 299])
    assert (sparse[:, :64, 299] == GARBAGE).all()


class TestMultiply:
    @staticmethod
    def run(activated: Tensor, sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        counts = (activated == 0).sum(-1, dtype=torch.int32)
        zero_counts = torch.stack((counts, torch.ones_like(counts)))
        hidden = torch.full(activated.shape, GARBAGE, dtype=dtype, device=DEVICE)
        zeros = torch.full((len(activated),), 99, device=DEVICE)
        launch_multiply(activated, sums, zero_counts, hidden, zeros)
        return hidden, zeros

    @every_dtype
    @pytest.mark.parametrize("count", [1, 3, 33])
    def test_rounds_the_product_once_to_the_nearest(self, count: int, dtype: torch.dtype) -> None:
        activated = normal(count, INTERMEDIATE, seed=1).relu().to(DEVICE)
        sums = normal(2, count, INTERMEDIATE, seed=2).to(DEVICE)

        hidden, zeros = self.run(activated, sums, dtype)

        assert torch.equal(hidden, (activated * (sums[0] + sums[1])).to(dtype))
        assert torch.equal(zeros, (activated == 0).sum(-1) + 1)

    @pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -1.0])
    def test_an_idle_neuron_gives_plus_0_whatever_lies_in_its_place(self, garbage: float) -> None:
        activated = torch.tensor([[0.0, -0.0, 2.0]], device=DEVICE)
        sums = torch.tensor([[[garbage, garbage, 3.0]]], device=DEVICE)

        hidden, _ = self.run(activated, sums, torch.float32)

        assert hidden.tolist() == [[0.0, 0.0, 6.0]]
        assert not hidden.signbit().any()
