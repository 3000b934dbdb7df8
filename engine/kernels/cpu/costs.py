"""Times both feed-forward paths of RELU rows, for the router that may follow the load."""

import statistics
import time
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
    dense: list[float] = []
    low: list[float] = []
    high: list[float] = []
    for rows in MEASURED_ROWS:
        x = torch.randn(rows, backend.config.hidden_size, generator=generator)
        x[:, 0] = 1
        dense.append(_median_seconds(backend, x, gates[LOW_ZEROS], sparse=False))
        low.append(_median_seconds(backend, x, gates[LOW_ZEROS], sparse=True))
        high.append(_median_seconds(backend, x, gates[HIGH_ZEROS], sparse=True))
    return FfnCosts(tuple(dense), tuple(low), tuple(high))


def _gate(backend: "CpuBackend", zeros: float, generator: torch.Generator) -> Tensor:
    """[intermediate, hidden] whose products with rows (1, noise) are normal, the wanted share of them negative."""
    config = backend.config
    gate = torch.randn(config.intermediate_size, config.hidden_size, generator=generator) / config.hidden_size**0.5
    gate[:, 0] = -statistics.NormalDist().inv_cdf(zeros)
    return gate


def _median_seconds(backend: "CpuBackend", x: Tensor, gate: Any, *, sparse: bool) -> float:
    step = _step(len(x), sparse)
    seconds = []
    for turn in range(REPEATS + 1):
        start = time.perf_counter()
        backend.feed_forward(turn % backend.config.num_layers, x, step, gate=gate)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _step(rows: int, sparse: bool) -> StepInputs:
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
