"""Times both feed-forward paths of RELU rows, for the router that may follow the load."""

import statistics
import time
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.activation import MODE_CODE, ActivationMode, ActivationRows, PositiveBranch
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
    gates = {zeros: backend.store_gate(_gate(backend, zeros, generator)) for zeros in (LOW_ZEROS, HIGH_ZEROS)}
    costs = []
    for rows in MEASURED_ROWS:
        x = torch.randn(rows, backend.config.hidden_size, generator=generator)
        x[:, 0] = 1
        costs.append(_median_seconds(backend, x, gates))
    return FfnCosts(*zip(*costs, strict=True))


def _gate(backend: "CpuBackend", zeros: float, generator: torch.Generator) -> Tensor:
    """[intermediate, hidden] whose products with rows (1, noise) are normal, the wanted share of them negative."""
    config = backend.config
    gate = torch.randn(config.intermediate_size, config.hidden_size, generator=generator) / config.hidden_size**0.5
    gate[:, 0] = -statistics.NormalDist().inv_cdf(zeros)
    return gate


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
    activations = ActivationRows(
        mode=torch.full((rows,), MODE_CODE[ActivationMode.RELU]),
        threshold=torch.zeros(rows, dtype=torch.int64),
        keys=torch.zeros(rows, 2, dtype=torch.int64),
        positions=torch.zeros(rows, dtype=torch.int64),
        positive_branch=PositiveBranch.SILU,
    )
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
