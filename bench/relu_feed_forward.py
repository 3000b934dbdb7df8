"""Feed-forward blocks alone, layer by layer: dense with SILU against sparse with RELU, on rows that really occur.

What goes into each block is taken down while the engine decodes in RELU mode; there the reference kernels stand in for
the engine's own, which run all layers in one call that nobody can look into. The engine's own then run both paths on
these rows, layer after layer as in a step, so that weights come from where a step finds them and not from a cache that
one layer fits in.
"""

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.results import spread
from engine.activation import ALWAYS_SILU, MODE_CODE, ActivationMode, apply_activation
from engine.engine import Engine
from engine.kernels.cpu.backend import CpuBackend
from engine.kernels.reference import ReferenceBackend
from engine.models.config import LayerWeights
from engine.step import StepInputs

GATE_SHARE = 1 / 3  # of a block's weights: the gate is computed for all neurons, `up` and `down` for active ones


@dataclass(frozen=True, slots=True)
class Batch:
    """Token rows of one step and what went into the feed-forward block of each layer.

    Attributes:
        step: The step; all its rows are generated tokens in RELU mode.
        hidden: [layers], each float32 [rows, hidden], normalised.
    """

    step: StepInputs
    hidden: list[Tensor]


@dataclass(frozen=True, slots=True)
class BlockTimes:
    """One block, or all of them together.

    Attributes:
        zeros: Share of act(gate) that is 0, in [0, 1].
        idle: Share of neurons that no row of a batch uses: whose `up` and `down` need not be read.
        silu_us: Microseconds of the dense path with SILU, one figure for each round.
        relu_us: Microseconds of the sparse path with RELU, likewise.
    """

    zeros: float
    idle: float
    silu_us: tuple[float, ...]
    relu_us: tuple[float, ...]

    @property
    def speedup(self) -> tuple[float, ...]:
        """How many times as fast RELU is, by round."""
        return tuple(silu / relu for silu, relu in zip(self.silu_us, self.relu_us, strict=True))

    @property
    def bound(self) -> float:
        """The speedup if time were bytes of weights read, and nothing else."""
        return 1 / (GATE_SHARE + (1 - GATE_SHARE) * (1 - self.idle))

    @classmethod
    def together(cls, blocks: Sequence["BlockTimes"]) -> "BlockTimes":
        """Blocks of one size, one after another."""
        return cls(
            zeros=statistics.fmean(block.zeros for block in blocks),
            idle=statistics.fmean(block.idle for block in blocks),
            silu_us=tuple(map(sum, zip(*(block.silu_us for block in blocks), strict=True))),
            relu_us=tuple(map(sum, zip(*(block.relu_us for block in blocks), strict=True))),
        )

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {
            "zeros": round(self.zeros, 4),
            "idle": round(self.idle, 4),
            "silu_us": spread(self.silu_us),
            "relu_us": spread(self.relu_us),
            "relu_speedup": spread(self.speedup, digits=3),
            "bound": round(self.bound, 3),
        }


@dataclass(frozen=True, slots=True)
class RowsResult:
    """All layers at one number of rows.

    Attributes:
        rows: Token rows at once.
        layers: One entry for each layer.
    """

    rows: int
    layers: tuple[BlockTimes, ...]

    @property
    def total(self) -> BlockTimes:
        """All layers of a step together."""
        return BlockTimes.together(self.layers)

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        layers = [{"layer": number, **block.to_json()} for number, block in enumerate(self.layers)]
        return {"rows": self.rows, "all_layers": self.total.to_json(), "layers": layers}


class Recorder(ReferenceBackend):
    """Computes steps with a backend's own weights and cache, and keeps what goes into the feed-forward blocks.

    Args:
        backend: Whose place it takes; its zeros are counted on.
    """

    def __init__(self, backend: CpuBackend) -> None:
        super().__init__(backend.config, backend.weights, backend.cache)
        self.sparsity = backend.sparsity
        self.backend = backend
        self.batches: list[Batch] = []

    def forward(self, step: StepInputs) -> Tensor:
        """See `Backend.forward`."""
        self.batches.append(Batch(copy.deepcopy(step), []))  # the next step may be written into the same memory
        return super().forward(step)

    def _feed_forward(self, layer: int, weights: LayerWeights, x: Tensor, step: StepInputs) -> Tensor:
        self.batches[-1].hidden.append(x.float())
        return super()._feed_forward(layer, weights, x, step)


@contextmanager
def recording(engine: Engine) -> Iterator[Recorder]:
    """Record the steps that the engine, whose weights are not quantised, computes meanwhile."""
    runner = engine._runner  # for this benchmark alone the engine is not worth a switch
    backend = runner.backend
    assert isinstance(backend, CpuBackend)
    runner.backend = recorder = Recorder(backend)
    try:
        yield recorder
    finally:
        runner.backend = backend


def split(batch: Batch, rows: int) -> Iterator[Batch]:
    """The same rows in batches of `rows` that skip their zeros; rows that do not fill one are left out."""
    step = batch.step
    for first in range(0, len(step.positions) - rows + 1, rows):
        part = slice(first, first + rows)
        activations = replace(
            step.activations,
            mode=step.activations.mode[part],
            threshold=step.activations.threshold[part],
            keys=step.activations.keys[part],
            positions=step.activations.positions[part],
        )
        some = replace(
            step,
            token_ids=step.token_ids[part],
            positions=step.positions[part],
            slots=step.slots[part],
            row_sequence=step.row_sequence[part],
            activations=activations,
            skip_zeros=True,
            sample_rows=step.sample_rows[:0],
        )
        yield Batch(some, [x[part] for x in batch.hidden])


def dense_silu(batch: Batch) -> Batch:
    """The same rows as requests in SILU mode."""
    rows = batch.step.activations
    activations = replace(
        rows,
        mode=torch.full_like(rows.mode, MODE_CODE[ActivationMode.SILU]),
        threshold=torch.full_like(rows.threshold, ALWAYS_SILU),
    )
    return replace(batch, step=replace(batch.step, activations=activations, skip_zeros=False))


@torch.inference_mode()
def measure(backend: CpuBackend, batches: Sequence[Batch], rounds: int) -> tuple[BlockTimes, ...]:
    """Time both paths on the same batches, taking turns.

    Args:
        backend: The recorded steps' own. Its kernels are compiled.
        batches: Recorded batches, all of the same number of rows.
        rounds: Turns of each side.

    Returns:
        One entry for each layer.
    """
    sides = {ActivationMode.SILU: [dense_silu(batch) for batch in batches], ActivationMode.RELU: batches}
    seconds: dict[ActivationMode, list[list[float]]] = {mode: [] for mode in sides}
    for _ in range(rounds):
        for mode, own in sides.items():
            seconds[mode].append(_median_seconds(backend, own))
    silu_us, relu_us = (1e6 * np.array(seconds[mode]) for mode in sides)
    times = []
    for layer in range(backend.config.num_layers):
        zeros, idle = _zeros_and_idle(backend, batches, layer)
        times.append(BlockTimes(zeros, idle, tuple(silu_us[:, layer].tolist()), tuple(relu_us[:, layer].tolist())))
    return tuple(times)


def _median_seconds(backend: CpuBackend, batches: Sequence[Batch]) -> list[float]:
    """Seconds of each layer's block, the median over the batches."""
    seconds = np.empty((len(batches), backend.config.num_layers))
    for number, batch in enumerate(batches):
        for layer, x in enumerate(batch.hidden):
            start = time.perf_counter()
            backend.feed_forward(layer, x, batch.step)
            seconds[number, layer] = time.perf_counter() - start
    medians: list[float] = np.median(seconds, axis=0).tolist()
    return medians


def _zeros_and_idle(backend: CpuBackend, batches: Sequence[Batch], layer: int) -> tuple[float, float]:
    """Shares of a layer's values that are 0, and of its neurons that no row of a batch uses, means over the batches."""
    gate = backend.weights.layers[layer].gate.float()
    active = [apply_activation(batch.hidden[layer] @ gate.t(), batch.step.activations, layer) != 0 for batch in batches]
    used = statistics.fmean(rows.float().mean().item() for rows in active)
    needed = statistics.fmean(rows.any(0).float().mean().item() for rows in active)
    return 1 - used, 1 - needed
