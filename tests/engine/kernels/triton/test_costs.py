"""Costs of both feed-forward paths, from the device's table or measured."""

from pathlib import Path

import pytest
import torch

from engine.device import device_name
from engine.ffn_router import MEASURED_ROWS
from engine.kernels.triton.costs import ffn_costs, measure_ffn_costs
from engine.kernels.triton.feed_forward import scratch_bytes
from engine.kernels.triton.linear import Workspace
from engine.kernels.triton.tune import Layer
from engine.kernels.triton.tuning import FOLDER_VARIABLE, DeviceTable, costs_key, save_table
from tests.engine.kernels.kinds import normal
from tests.engine.kernels.triton.devices import DEVICE

LAYERS = [Layer(normal(96, 32, seed=seed).to(DEVICE), normal(96, 32, seed=seed + 1).to(DEVICE)) for seed in (0, 2)]
SECONDS = tuple(float(rows) for rows in MEASURED_ROWS)


@pytest.fixture
def workspace() -> Workspace:
    return Workspace(scratch_bytes(LAYERS[0].up), DEVICE)


def test_both_paths_are_measured_for_each_number_of_rows(workspace: Workspace) -> None:
    costs = measure_ffn_costs(LAYERS, workspace, counts=(1, 2), repeats=1)

    for side in (costs.dense, costs.sparse_low, costs.sparse_high):
        assert len(side) == 2
        assert min(side) > 0


def test_costs_of_the_table_are_not_measured_again(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    entry = {"dense": SECONDS, "sparse_low": SECONDS, "sparse_high": SECONDS}
    save_table(device_name(DEVICE), DeviceTable({}, {costs_key(32, 96, torch.float32): entry}))

    costs = ffn_costs(LAYERS, workspace)

    assert costs.dense == costs.sparse_low == costs.sparse_high == SECONDS
