"""Counts of zeros on the device, against `SparsityCounters`."""

import pytest
import torch

from engine.activation import ActivationMode
from engine.kernels.triton.counters import DeviceCounters
from engine.sparsity import SparsityCounters
from tests.engine.kernels.triton.devices import DEVICE, ROWS

LAYERS, INTERMEDIATE, CAPACITY = 3, 100, 80


def steps(rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Zeros [layers, capacity] and modes [rows] of two steps; columns without a row hold garbage."""
    generator = torch.Generator().manual_seed(rows)
    return [
        (
            torch.randint(INTERMEDIATE, (LAYERS, CAPACITY), dtype=torch.int32, generator=generator),
            torch.randint(3, (rows,), generator=generator),
        )
        for _ in range(2)
    ]


@pytest.mark.parametrize("rows", [*ROWS, 70])
def test_counts_equal_those_of_the_cpu(rows: int) -> None:
    found, expected = DeviceCounters(LAYERS, INTERMEDIATE, DEVICE), SparsityCounters(LAYERS)

    for zeros, modes in steps(rows):
        found.add_rows(zeros.to(DEVICE), modes.to(DEVICE))
        expected.add(modes.numpy(), zeros[:, :rows].numpy(), INTERMEDIATE)
    _wait()

    assert found.by_mode() == expected.by_mode()
    assert [found.share(mode) for mode in ActivationMode] == [expected.share(mode) for mode in ActivationMode]


def test_padding_rows_do_not_count() -> None:
    counters = DeviceCounters(LAYERS, INTERMEDIATE, DEVICE)
    zeros = torch.full((LAYERS, CAPACITY), 5, dtype=torch.int32, device=DEVICE)

    counters.add_rows(zeros, torch.tensor([2, -1, -1], device=DEVICE))
    _wait()

    assert counters.share(ActivationMode.RELU) == (5 * LAYERS, INTERMEDIATE * LAYERS)
    assert counters.zeros.sum() == 5 * LAYERS


def test_reset_forgets_everything() -> None:
    counters = DeviceCounters(LAYERS, INTERMEDIATE, DEVICE)
    zeros, modes = steps(8)[0]
    counters.add_rows(zeros.to(DEVICE), modes.to(DEVICE))

    counters.reset()
    assert counters.zeros.sum() == counters.elements.sum() == 0
    counters.add_rows(zeros.to(DEVICE), modes[:1].to(DEVICE))
    _wait()

    assert counters.elements.sum() == INTERMEDIATE * LAYERS


def test_more_rows_than_there_is_room_for_are_refused() -> None:
    counters = DeviceCounters(LAYERS, INTERMEDIATE, DEVICE)

    with pytest.raises(ValueError, match="at most 4 rows, got 5"):
        counters.add_rows(
            torch.zeros(LAYERS, 4, dtype=torch.int32, device=DEVICE), torch.zeros(5, dtype=torch.int64, device=DEVICE)
        )


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
