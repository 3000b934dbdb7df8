"""Executes a step plan: model, kernels, KV cache and sampler."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.activation import ALWAYS_SILU, MODE_CODE, Activation, ActivationMode, ActivationRows
from engine.config import EngineConfig, FfnPath, KernelSet
from engine.ffn_router import FfnRouter
from engine.ffn_work import FfnWork
from engine.kernels.backend import Backend
from engine.kernels.cpu.backend import CpuBackend
from engine.kernels.reference import ReferenceBackend
from engine.kv_cache import BLOCK_SIZE, KVCache
from engine.logits import edits_logits
from engine.models.checkpoint import Checkpoint
from engine.models.weights import move_weights
from engine.request import Request, Sequence
from engine.sampler import SampledToken, SamplingRow, UnusableLogits
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledSequence, StepPlan
from engine.step import StepInputs
from engine.step_clock import StepClock, StepPhase

IntArray = NDArray[np.integer[Any]]

_SILU, _RELU = MODE_CODE[ActivationMode.SILU], MODE_CODE[ActivationMode.RELU]

# Logits of a prompt that is scored are made and reduced this many rows at a time: 256 rows of 49,152 are 50 MB.
SCORE_ROWS = 256

_NO_ROWS = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step gave.

    Attributes:
        tokens: The next token of each scheduled sequence that samples, in the plan's order; None where the model's
            logits are not finite, so that one such sequence does not take the others with it.
        zeros: int64 [samples], values of act(gate) that were 0, over all layers, in the row that gave each token.
        logprobs: float32 [scored], of the plan's `score_token_ids` one after another; NaN where logits are not finite.
    """

    tokens: list[SampledToken | None]
    zeros: NDArray[np.int64]
    logprobs: NDArray[np.float32]


class Runner:
    """Runs plans over one model. Not thread-safe: one thread calls it.

    Args:
        checkpoint: The model.
        config: Engine configuration.
        device: What computes.
        num_blocks: Size of the KV cache.
        max_model_len: Longest sequence.
        progress: Called with a line of text before each long step.

    Attributes:
        clock: Where the time of steps goes. Whoever plans a step starts it.
        work: What steps read and were spared.
        ffn_rows: RELU rows by the path they took.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: EngineConfig,
        device: torch.device,
        num_blocks: int,
        max_model_len: int,
        progress: Callable[[str], None],
    ) -> None:
        self._support = checkpoint.support
        self.cache = KVCache.allocate(checkpoint.config, num_blocks, checkpoint.weights.embedding.dtype, device)
        progress("Preparing kernels (compiled on the first start, then cached)")
        self.backend = _create_backend(checkpoint, config, self.cache, max_model_len)
        # Where no RELU row can come, there is nothing to choose, and nothing to time at each start.
        may_skip = config.allow_untuned_activations or ActivationMode.RELU in checkpoint.support.modes
        path = config.ffn_path if may_skip and config.kernels is not KernelSet.REFERENCE else FfnPath.DENSE
        self.router = FfnRouter(path, self.backend.measure_ffn_costs)
        self.clock = StepClock()
        shape = checkpoint.config
        neurons = shape.num_layers * shape.intermediate_size
        self.work = FfnWork(shape.hidden_size, neurons, self.backend.weight_sizes)
        self.ffn_rows = {"sparse": 0, "dense": 0}
        self.backend.prepare(checkpoint.support.positive_branch, may_skip=path is not FfnPath.DENSE)
        self._warm_up()

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan's tokens, and the log-probabilities that it wants."""
        step = self._inputs(plan)
        self.clock.lap(StepPhase.PREPARE)
        zeros_before = self._relu_zeros() if step.skip_zeros else 0
        hidden = self.backend.forward(step)
        self.clock.lap(StepPhase.LAYERS)
        rows = [_sampling_row(item) for item in plan.scheduled if item.samples]
        # All rows of a decoding step are sampled: nothing to gather, and the backend may have their logits already.
        logits = self.backend.logits(hidden if len(rows) == len(hidden) else hidden[step.sample_rows])
        self.clock.lap(StepPhase.HEAD)
        tokens = self._sample(logits, rows)
        result = StepResult(tokens, self.backend.row_zeros[step.sample_rows.numpy()], self._score(hidden, step))
        self.clock.lap(StepPhase.SAMPLE)
        self._count_work(step, zeros_before)
        return result

    def _count_work(self, step: StepInputs, zeros_before: int) -> None:
        """Count what a step read and, if it skipped zeros, was spared, given the zeros of RELU mode before it."""
        heads = (len(step.sample_rows) > 0) + -(-len(step.score_rows) // SCORE_ROWS)
        neurons, relu_rows, zeros = None, 0, 0
        if step.skip_zeros:
            neurons = self.backend.neurons_read
            relu_rows = int((step.activations.mode == _RELU).sum())
            zeros = self._relu_zeros() - zeros_before
        self.work.add(len(step.token_ids), heads, neurons, relu_rows, zeros)

    def _relu_zeros(self) -> int:
        return self.backend.sparsity.share(ActivationMode.RELU)[0]

    def _sample(self, logits: Tensor, rows: list[SamplingRow]) -> list[SampledToken | None]:
        """The next token of each row; None where there is none to draw."""
        good = list(range(len(rows)))
        while True:
            try:
                # Without bad rows, the rule, nothing is copied: logits of 32 rows are 6 MB.
                some = logits if len(good) == len(rows) else logits[good]
                drawn = self.backend.sample(some, [rows[index] for index in good])
            except UnusableLogits as error:
                good = [index for place, index in enumerate(good) if place not in error.rows]
            else:
                tokens: list[SampledToken | None] = [None] * len(rows)
                for index, token in zip(good, drawn, strict=True):
                    tokens[index] = token
                return tokens

    def _score(self, hidden: Tensor, step: StepInputs) -> NDArray[np.float32]:
        """float32 [scored], the log-probabilities that the step wants."""
        logprobs = np.empty(len(step.score_rows), np.float32)
        for first in range(0, len(logprobs), SCORE_ROWS):
            some = slice(first, first + SCORE_ROWS)
            logits = self.backend.logits(hidden[step.score_rows[some]])
            logprobs[some] = self.backend.score(logits, step.score_tokens[some])
        return logprobs

    def _warm_up(self) -> None:
        """Run a step of all modes, so that kernels are compiled before the first request and not by it."""
        sampling = SamplingParams(top_p=0.9, repetition_penalty=1.1, logprobs=1, seed=0)
        scheduled = []
        for mode in ActivationMode:
            request = Request.create("warm-up", [0], sampling, Activation(mode).with_seed(0), max_model_len=2)
            sequence = Sequence(request, 0, end_token_ids=())
            sequence.token_ids.append(0)
            sequence.block_ids.append(0)
            scheduled.append(ScheduledSequence(sequence, start=0, count=2, samples=True))
        self.run(StepPlan(tuple(scheduled)))
        for counters in (self.backend.sparsity, self.backend.draws, self.clock, self.work):
            counters.reset()
        self.ffn_rows = dict.fromkeys(self.ffn_rows, 0)

    def _inputs(self, plan: StepPlan) -> StepInputs:
        """Lay the plan's tokens out as rows."""
        items = plan.scheduled
        layout = _layout(items)
        sequence, tokens, positions = layout.sequence, layout.tokens, layout.positions
        tables = np.zeros((len(items), max(len(item.sequence.block_ids) for item in items)), np.int32)
        for line, item in zip(tables, items, strict=True):
            line[: len(item.sequence.block_ids)] = item.sequence.block_ids
        mode, threshold, keys = self._activations(items, sequence, positions)
        slots = tables[sequence, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        rows = ActivationRows(
            mode=torch.from_numpy(mode),
            threshold=torch.from_numpy(threshold),
            keys=torch.from_numpy(keys),
            positions=torch.from_numpy(positions),
            positive_branch=self._support.positive_branch,
        )
        return StepInputs(
            token_ids=torch.from_numpy(tokens),
            positions=rows.positions,
            slots=torch.from_numpy(slots),
            row_sequence=torch.from_numpy(sequence),
            block_tables=torch.from_numpy(tables),
            activations=rows,
            skip_zeros=self._skip_zeros(mode == _RELU),
            sample_rows=torch.from_numpy(layout.sample_rows),
            score_rows=torch.from_numpy(layout.score_rows),
            score_tokens=torch.from_numpy(layout.score_tokens),
        )

    def _activations(
        self, items: tuple[ScheduledSequence, ...], sequence: IntArray, positions: IntArray
    ) -> tuple[IntArray, IntArray, IntArray]:
        """Mode, threshold and Philox key of every row."""
        sequences = [item.sequence for item in items]
        active = positions >= np.array([s.first_active for s in sequences])[sequence]
        modes = np.array([MODE_CODE[s.request.activation.mode] for s in sequences])
        thresholds = np.array([s.threshold for s in sequences], np.int64)
        keys = np.array([s.activation_key for s in sequences], np.int64)
        mode = np.where(active, modes[sequence], _SILU)
        threshold = np.where(active, thresholds[sequence], ALWAYS_SILU)
        return mode, threshold, keys[sequence]

    def _skip_zeros(self, relu: NDArray[np.bool_]) -> bool:
        """Whether the step's feed-forward reads weights of active neurons only."""
        zeros, elements = self.backend.sparsity.share(ActivationMode.RELU)
        count = int(relu.sum())
        skip = self.router.skips(count, len(relu), zeros / elements if elements else 0.5)
        self.ffn_rows["sparse" if skip else "dense"] += count
        return skip


class _Layout(NamedTuple):
    """A plan's tokens as rows; see `StepInputs` for the fields of the same names."""

    sequence: NDArray[np.int32]
    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    sample_rows: NDArray[np.int64]
    score_rows: NDArray[np.int64]
    score_tokens: NDArray[np.int64]


def _layout(items: tuple[ScheduledSequence, ...]) -> _Layout:
    count = len(items)
    if all(item.count == 1 and item.samples and not item.score_token_ids for item in items):
        # Decoding, hundreds of times a second, with caches that are full of weights: as few operations as can be.
        rows = np.arange(count)
        starts = np.array([item.start for item in items], np.int64)
        tokens = np.array([item.sequence.token_ids[item.start] for item in items], np.int64)
        return _Layout(rows.astype(np.int32), tokens, starts, rows, _NO_ROWS, _NO_ROWS)
    counts = np.array([item.count for item in items])
    ends = np.cumsum(counts) - 1
    targets = [item.score_token_ids for item in items]
    score_rows = [first + i for first, after in zip(ends - counts + 1, targets, strict=True) for i in range(len(after))]
    spans = [slice(item.start, item.start + item.count) for item in items]
    tokens = np.concatenate([item.sequence.token_ids[span] for item, span in zip(items, spans, strict=True)])
    return _Layout(
        np.repeat(np.arange(count, dtype=np.int32), counts),
        tokens.astype(np.int64),
        np.concatenate([np.arange(span.start, span.stop) for span in spans]),
        np.array([end for end, item in zip(ends, items, strict=True) if item.samples], np.int64),
        np.array(score_rows, np.int64),
        np.array([token for after in targets for token in after], np.int64),
    )


def _sampling_row(item: ScheduledSequence) -> SamplingRow:
    sequence = item.sequence
    sampling, length = sequence.request.sampling, sequence.prompt_length
    return SamplingRow(
        params=sampling,
        key=sequence.sampling_key,
        position=len(sequence.token_ids),
        prompt_token_ids=sequence.request.prompt_token_ids,
        # Copied for those who look at it only: answers can be long.
        output_token_ids=sequence.token_ids[length:] if edits_logits(sampling, 0) else (),
        end_token_ids=sequence.end_token_ids,
        edits=sequence.edits,
    )


def _create_backend(checkpoint: Checkpoint, config: EngineConfig, cache: KVCache, max_model_len: int) -> Backend:
    if config.kernels is KernelSet.REFERENCE:
        return ReferenceBackend(checkpoint.config, checkpoint.weights, cache)
    if config.kernels is KernelSet.TRITON or cache.keys.is_cuda:
        return _create_triton_backend(checkpoint, config, cache, max_model_len)
    amx = False if config.kernels is KernelSet.VECTOR else None
    return CpuBackend(checkpoint.config, checkpoint.weights, cache, quantization=config.quantize, amx=amx)


def _create_triton_backend(checkpoint: Checkpoint, config: EngineConfig, cache: KVCache, max_model_len: int) -> Backend:
    from engine.kernels.triton.backend import StepLimits, TritonBackend  # needs a package that the CPU does without

    move_weights(checkpoint.weights, cache.keys.device)
    limits = StepLimits(rows=config.max_num_batched_tokens, sequences=config.max_num_seqs, tokens=max_model_len)
    return TritonBackend(checkpoint.config, checkpoint.weights, cache, limits=limits)
