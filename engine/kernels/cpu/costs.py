"""Times both feed-forward paths of RELU rows, for the router that may follow the load."""

import statistics
import time
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.ffn_probe import make_gate, make_rows, relu_rows
from engine.ffn_router import HIGH_ZEROS, LOW_ZEROS, MEASURED_ROWS, FfnCosts
from engine.step import StepInputs

if TYPE_CHECKING:
    from engine.kernels.cpu.backend import CpuBackend

REPEATS = 9


def measure_ffn_costs(backend: "CpuBackend") -> FfnCosts:
    """Go round the layers, so that weights come from memory as in real steps; takes about a second.

    A gate made for it gives each row its own zeros, of a known share.
    """
    generator = torch.Generator().manual_seed(0)
    config = backend.config
    like = torch.empty(config.intermediate_size, config.hidden_size)
    gates = {zeros: backend.store_gate(make_gate(like, zeros, generator)) for zeros in (LOW_ZEROS, HIGH_ZEROS)}
    costs = [_median_seconds(backend, make_rows(like, rows, generator), gates) for rows in MEASURED_ROWS]
    return FfnCosts(*zip(*costs, strict=True))


def _median_seconds(backend: "CpuBackend", x: Tensor, gates: dict[float, Any]) -> tuple[float, ...]:
    """Dense, sparse at low and sparse at high zeros: in turn, so that a machine that slows down slows all of them."""
    cases = [
        (gates[LOW_ZEROS], _step(len(x), sparse=False)),
        (gates[LOW_ZEROS], _step(len(x), sparse=True)),
        (gates[HIGH_ZEROS], _step(len(x), sparse=True)),
    ]
    layers = cycle(range(backend.config.num_layers))
    seconds = [[_seconds(backend, next(layers), x, gate, step) for gate, step in cases] for _ in range(1 + REPEATS)]
    return tuple(statistics.median(side) for side in zip(*seconds[1:], strict=True))


def _seconds(backend: "CpuBackend", layer: int, x: Tensor, gate: Any, step: StepInputs) -> float:
    start = time.perf_counter()
    backend.feed_forward(layer, x, step, gate=gate)
    return time.perf_counter() - start


def _step(rows: int, *, sparse: bool) -> StepInputs:
    nothing = torch.zeros(0, dtype=torch.int64)
    activations = relu_rows(rows, torch.device("cpu"))
    return StepInputs(
        token_ids=torch.zeros(rows, dtype=torch.int64),
        positions=activations.positions,
        slots=torch.zeros(rows, dtype=torch.int64),
        row_sequence=torch.zeros(rows, dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        activations=activations,
        skip_zeros=sparse,
        sample_rows=nothing,
        score_rows=nothing,
        score_tokens=nothing,
    )
