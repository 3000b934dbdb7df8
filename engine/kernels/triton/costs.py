"""Costs of both feed-forward paths of RELU rows, for the router: from the device's table, else measured at start."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from engine.device import device_name
from engine.ffn_probe import make_gate, make_rows, relu_rows
from engine.ffn_router import HIGH_ZEROS, LOW_ZEROS, MEASURED_ROWS, FfnCosts
from engine.kernels.triton.feed_forward import feed_forward
from engine.kernels.triton.linear import Workspace
from engine.kernels.triton.timing import median_seconds
from engine.kernels.triton.tuning import costs_key, load_table

REPEATS = 9


class Projections(Protocol):
    """Feed-forward weights of a layer, such as `LayerWeights`."""

    @property
    def up(self) -> Tensor:
        """[intermediate, hidden]."""

    @property
    def down(self) -> Tensor:
        """[intermediate, hidden]."""


def ffn_costs(layers: Sequence[Projections], workspace: Workspace) -> FfnCosts:
    """Costs of one layer: those of the device's table, where it has such layers, else measured now.

    Args:
        layers: All layers of a model, on its device.
        workspace: As `feed_forward` needs it.
    """
    weight = layers[0].up
    intermediate, hidden = weight.shape
    known = load_table(device_name(weight.device)).costs.get(costs_key(hidden, intermediate, weight.dtype))
    if known is not None:
        costs = FfnCosts(**known)
        if {len(costs.dense), len(costs.sparse_low), len(costs.sparse_high)} == {len(MEASURED_ROWS)}:
            return costs
    return measure_ffn_costs(layers, workspace)


def measure_ffn_costs(
    layers: Sequence[Projections], workspace: Workspace, counts: Sequence[int] = MEASURED_ROWS, repeats: int = REPEATS
) -> FfnCosts:
    """Go round the layers, so that weights come from memory as in real steps.

    A gate made for it gives each row its own zeros, of a known share.

    Args:
        layers: All layers of a model, on its device.
        workspace: As `feed_forward` needs it.
        counts: Numbers of rows.
        repeats: Of each measurement; the median counts.

    Returns:
        Seconds of one layer, one entry for each of `counts`.
    """
    generator = torch.Generator(layers[0].up.device).manual_seed(0)
    low, high = (make_gate(layers[0].up, zeros, generator) for zeros in (LOW_ZEROS, HIGH_ZEROS))
    dense, sparse_low, sparse_high = [], [], []
    for count in counts:
        x = make_rows(layers[0].up, count, generator)
        times = partial(_layer_seconds, layers, x, workspace, repeats)
        dense.append(times(low, skip_zeros=False))
        sparse_low.append(times(low, skip_zeros=True))
        sparse_high.append(times(high, skip_zeros=True))
    return FfnCosts(tuple(dense), tuple(sparse_low), tuple(sparse_high))


def _layer_seconds(
    layers: Sequence[Projections], x: Tensor, workspace: Workspace, repeats: int, gate: Tensor, *, skip_zeros: bool
) -> float:
    rows = relu_rows(len(x), x.device)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)

    def sweep() -> None:
        for index, layer in enumerate(layers):
            feed_forward(
                x,
                gate,
                layer.up,
                layer.down,
                rows,
                index,
                skip_zeros=skip_zeros,
                workspace=workspace,
                out=out,
                zeros=zeros,
            )

    return median_seconds(sweep, x.device, repeats) / len(layers)
