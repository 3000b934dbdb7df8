"""Executes a step plan: model, kernels, KV cache and sampler."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.activation import MODE_CODE, Activation, ActivationMode
from engine.config import EngineConfig, FfnPath, KernelSet
from engine.ffn_router import FfnRouter
from engine.ffn_work import FfnWork
from engine.kernels.backend import Backend
from engine.kernels.cpu.backend import CpuBackend
from engine.kernels.reference import ReferenceBackend
from engine.kv_cache import KVCache
from engine.logits import edits_logits
from engine.models.checkpoint import Checkpoint
from engine.models.weights import move_weights
from engine.request import Request, Sequence
from engine.sampler import SampledToken, SamplingRow, UnusableLogits
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledSequence, StepPlan
from engine.step import StepInputs
from engine.step_builder import StepBuilder
from engine.step_clock import StepClock, StepPhase

_RELU = MODE_CODE[ActivationMode.RELU]

# Logits of a prompt that is scored are made and reduced this many rows at a time: 256 rows of 49,152 are 50 MB.
SCORE_ROWS = 256

_NO_SCORES = np.empty(0, np.float32)


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
        self._builder = StepBuilder(checkpoint.support.positive_branch, self._skip_zeros)
        self.backend.prepare(checkpoint.support.positive_branch, may_skip=path is not FfnPath.DENSE)
        self._warm_up()

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan's tokens, and the log-probabilities that it wants."""
        step = self._builder.build(plan)
        self.clock.lap(StepPhase.PREPARE)
        hidden = self.backend.forward(step)
        self.clock.lap(StepPhase.LAYERS)
        rows = [_sampling_row(item) for item in plan.scheduled if item.samples]
        # All rows of a decoding step are sampled: nothing to gather, and the backend may have their logits already.
        all_sampled = len(rows) == plan.num_tokens
        logits = self.backend.logits(hidden if all_sampled else hidden[step.sample_rows])
        self.clock.lap(StepPhase.HEAD)
        tokens = self._sample(logits, rows)
        zeros = self.backend.row_zeros
        result = StepResult(
            tokens,
            zeros if all_sampled else zeros[step.sample_rows.numpy()],
            self._score(hidden, step) if not all_sampled else _NO_SCORES,
        )
        self.clock.lap(StepPhase.SAMPLE)
        self._count_work(step)
        return result

    def _count_work(self, step: StepInputs) -> None:
        """Count what a step read and, if it skipped zeros, was spared."""
        heads = (len(step.sample_rows) > 0) + -(-len(step.score_rows) // SCORE_ROWS)
        neurons, relu_rows, zeros = None, 0, 0
        if step.skip_zeros:
            neurons = self.backend.neurons_read
            relu = step.activations.mode.numpy() == _RELU
            relu_rows, zeros = int(relu.sum()), int(self.backend.row_zeros[relu].sum())
        self.work.add(len(step.token_ids), heads, neurons, relu_rows, zeros)

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

    def _skip_zeros(self, relu: int, rows: int) -> bool:
        """Whether a step's feed-forward reads weights of active neurons only."""
        if relu == 0:
            return False
        zeros, elements = self.backend.sparsity.share(ActivationMode.RELU)
        skip = self.router.skips(relu, rows, zeros / elements if elements else 0.5)
        self.ffn_rows["sparse" if skip else "dense"] += relu
        return skip


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
