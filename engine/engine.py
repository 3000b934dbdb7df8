"""The engine: the life of a request, from its check to its last token.

    check -> add -> (schedule -> run -> advance)* -> finish

`Engine` is synchronous and belongs to one thread; `AsyncEngine` and `LLM` drive it.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from engine.activation import Activation, Scope
from engine.block_pool import BlockPool
from engine.config import DType, EngineConfig, KernelSet, Quantization
from engine.detokenizer import Detokenizer
from engine.device import choose_device, device_name
from engine.errors import ContextLengthExceeded, InvalidConfig, InvalidRequest
from engine.info import EngineStats, ModelInfo
from engine.kv_cache import BLOCK_SIZE, block_bytes, blocks_for
from engine.logits import check_token_ids
from engine.models.checkpoint import Checkpoint, load_checkpoint
from engine.models.weights import tensors_of
from engine.outputs import FinishReason, PositionLogprobs, RequestOutput, SampleOutput, TokenLogprob
from engine.request import Request, Sequence
from engine.runner import Runner, StepResult
from engine.sampler import SampledToken
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler, StepPlan
from engine.step_clock import StepPhase
from engine.threads import use_threads
from engine.tokenizer import load_tokenizer


@dataclass(slots=True)
class _Sample:
    """A live sequence and the text made of it."""

    sequence: Sequence
    detokenizer: Detokenizer


@dataclass(slots=True)
class _Live:
    """A live request: its unfinished samples by index."""

    request: Request
    samples: dict[int, _Sample]
    logprobs: list[float] = field(default_factory=list)  # of the prompt's tokens, if it is scored


def silent(line: str) -> None:
    """Report no progress."""


class Engine:
    """A model, its KV cache and the requests in flight.

    Args:
        config: What to load and how to run it.
        progress: Called with a line of text before each long step.

    Raises:
        ModelLoadError: The model or adapter cannot be loaded.
        InvalidConfig: The configuration does not fit the model.
    """

    def __init__(self, config: EngineConfig, progress: Callable[[str], None] = silent) -> None:
        _check_config(config)
        device = choose_device(config)
        self.config = config
        threads = use_threads(config.threads)
        checkpoint = load_checkpoint(
            config.model, dtype=_dtype(config.dtype), adapter=config.adapter, progress=progress
        )
        self.tokenizer = load_tokenizer(checkpoint.tokenizer_source)
        checkpoint.tokenizer_source = checkpoint.path  # lets go of an open file and of all strings in it
        num_blocks, max_model_len = _size_cache(config, checkpoint)
        self._end_token_ids = tuple(dict.fromkeys((*checkpoint.eos_token_ids, *self.tokenizer.eos_token_ids)))
        digest = _digest(tensors_of(checkpoint.weights), config.quantize)  # before the runner lets go of tensors
        self._runner = Runner(checkpoint, config, device, num_blocks, max_model_len, progress)
        self._pool = BlockPool(num_blocks, config.prefix_caching)
        self._scheduler = Scheduler(self._pool, config.max_num_seqs, config.max_num_batched_tokens)
        self._live: dict[str, _Live] = {}
        self._prompt_tokens = self._cached_prompt_tokens = self._generated_tokens = 0
        self._aborted = self._steps = 0
        self.info = _describe(
            checkpoint,
            self._runner,
            quantization=config.quantize,
            weights_digest=digest,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            threads=threads,
            device=device,
        )

    # A request's life, in order.

    def check(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        sampling: SamplingParams,
        activation: Activation,
    ) -> Request:
        """Check a request against the model and fill in its seeds. Changes nothing; any thread may call it.

        Raises:
            InvalidRequest: A token id is outside the vocabulary, or the prompt is empty.
            ContextLengthExceeded: The prompt leaves no room for a token.
            UntunedActivation: The checkpoint does not support the activation.
        """
        limit = self.info.max_model_len
        self._check_prompt(prompt_token_ids)
        if len(prompt_token_ids) >= limit:
            raise ContextLengthExceeded(
                f"the prompt has {len(prompt_token_ids)} tokens; with at least one to generate, "
                f"the context of {limit} tokens is exceeded",
                "prompt",
            )
        check_token_ids(sampling, self.info.vocab_size)
        if sampling.max_tokens is not None and len(prompt_token_ids) + sampling.max_tokens > limit:
            raise ContextLengthExceeded(
                f"the prompt's {len(prompt_token_ids)} tokens and max_tokens {sampling.max_tokens} "
                f"exceed the context of {limit} tokens",
                "max_tokens",
            )
        self._check_activation(activation)
        return Request.create(request_id, prompt_token_ids, sampling, activation, limit)

    def check_score(self, request_id: str, prompt_token_ids: SequenceOf[int], activation: Activation) -> Request:
        """Check a request for the log-probabilities of a prompt. Changes nothing; any thread may call it.

        Raises:
            InvalidRequest: A token id is outside the vocabulary, the prompt is empty, or the activation would leave it
                out.
            ContextLengthExceeded: The prompt is longer than the context.
            UntunedActivation: The checkpoint does not support the activation.
        """
        limit = self.info.max_model_len
        self._check_prompt(prompt_token_ids)
        if len(prompt_token_ids) > limit:
            raise ContextLengthExceeded(
                f"the prompt has {len(prompt_token_ids)} tokens; the context of {limit} tokens is exceeded", "prompt"
            )
        if activation.scope is not Scope.ALL:
            raise InvalidRequest(
                f"activation.scope must be 'all' where a prompt is scored: with '{activation.scope}' "
                "the prompt would run with SILU",
                "activation.scope",
            )
        self._check_activation(activation)
        return Request.scoring(request_id, prompt_token_ids, activation)

    def _check_prompt(self, token_ids: SequenceOf[int]) -> None:
        vocab_size = self.info.vocab_size
        if not token_ids:
            raise InvalidRequest("the prompt is empty; it must have at least one token", "prompt")
        bad = next((token for token in (min(token_ids), max(token_ids)) if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise InvalidRequest(f"prompt has the token id {bad}; ids must be in [0, {vocab_size - 1}]", "prompt")

    def _check_activation(self, activation: Activation) -> None:
        if not self.config.allow_untuned_activations:
            self.info.support.check(activation)

    def add(self, request: Request) -> None:
        """Queue a checked request: one sequence for each of its samples."""
        sampling = request.sampling
        end_token_ids = (() if sampling.ignore_eos else self._end_token_ids) + tuple(sampling.stop_token_ids)
        live = _Live(request, {})
        for index in range(sampling.n):
            sequence = Sequence(request, index, end_token_ids)
            live.samples[index] = _Sample(sequence, Detokenizer(self.tokenizer, tuple(sampling.stop)))
            self._scheduler.add(sequence)
            self._prompt_tokens += sequence.prompt_length
        self._live[request.request_id] = live

    def abort(self, request_id: str) -> None:
        """Forget a request and free all it holds; nothing happens if it is finished or unknown."""
        live = self._live.pop(request_id, None)
        if live is None:
            return
        for sample in live.samples.values():
            self._scheduler.finish(sample.sequence)
        self._aborted += 1

    def step(self) -> list[RequestOutput]:
        """Compute one step of all requests.

        Returns:
            What is new, one piece for each request that moved.
        """
        clock = self._runner.clock
        clock.start()
        plan = self._scheduler.schedule()
        if not plan.scheduled:
            return []
        _end_waiting(plan)
        clock.lap(StepPhase.SCHEDULE)
        try:
            outputs = self._advance_all(plan, self._runner.run(plan))
        except BaseException:  # Ctrl-C in a notebook, too: the cache must not promise what was never written
            self._scheduler.abandon(plan)
            raise
        clock.lap(StepPhase.DELIVER)
        self._steps += 1
        return outputs

    def _advance_all(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """Hand the step's results to their sequences and gather what is new by request."""
        outputs: dict[str, RequestOutput] = {}
        sampled = [item.sequence for item in plan.scheduled if item.samples]
        for sequence, token, zeros in zip(sampled, result.tokens, result.zeros.tolist(), strict=True):
            piece = self._advance(sequence, token, zeros)
            output = outputs.setdefault(sequence.request.request_id, self._output(sequence))
            output.samples.append(piece)
            output.finished = sequence.request.request_id not in self._live
        return [*outputs.values(), *self._collect_scores(plan, result.logprobs)]

    def _collect_scores(self, plan: StepPlan, logprobs: NDArray[np.float32]) -> Iterator[RequestOutput]:
        """Keep the step's log-probabilities of prompts; finish the prompts that now have all of theirs."""
        taken = 0
        for item in plan.scheduled:
            request = item.sequence.request
            if not request.scores_prompt:
                continue
            live = self._live[request.request_id]
            del live.logprobs[item.start :]  # a preempted prompt begins anew
            count = len(item.score_token_ids)
            live.logprobs += logprobs[taken : taken + count].tolist()
            taken += count
            if item.start + item.count == item.sequence.prompt_length:
                self._finish(item.sequence)
                output = self._output(item.sequence)
                output.prompt_logprobs, output.finished = tuple(live.logprobs), True
                yield output

    def _advance(self, sequence: Sequence, token: SampledToken | None, zeros: int) -> SampleOutput:
        """Append a sequence's next token, make text of it and see whether it ends."""
        live = self._live[sequence.request.request_id]
        sample = live.samples[sequence.index]
        if token is None:
            piece = SampleOutput(sequence.index, sample.detokenizer.finish(), finish_reason=FinishReason.ERROR)
        else:
            if sequence.num_generated == 0:
                self._cached_prompt_tokens += sequence.num_cached
            sequence.token_ids.append(token.token_id)
            sequence.ffn_zeros += zeros
            self._generated_tokens += 1
            piece = self._piece(sample, token)
        if piece.finish_reason is not None:
            piece.sparsity = self._sparsity(sequence)
            self._finish(sequence)
        return piece

    def _sparsity(self, sequence: Sequence) -> float | None:
        """Share of zeros in the rows that gave a sequence's tokens: one row a token, whatever the prefix cache had."""
        elements = sequence.num_generated * self.info.num_layers * self.info.intermediate_size
        return sequence.ffn_zeros / elements if elements else None

    def _finish(self, sequence: Sequence) -> None:
        """Let go of a sequence that has all it wanted, and of its request with the last one."""
        self._scheduler.finish(sequence)
        request_id = sequence.request.request_id
        live = self._live[request_id]
        del live.samples[sequence.index]
        if not live.samples:
            del self._live[request_id]

    def _piece(self, sample: _Sample, token: SampledToken) -> SampleOutput:
        sequence, detokenizer = sample.sequence, sample.detokenizer
        request = sequence.request
        piece = SampleOutput(sequence.index, token_ids=[token.token_id])
        if token.logprob is not None:
            piece.logprobs = [self._position_logprobs(token)]
        if token.token_id in sequence.end_token_ids:
            piece.finish_reason = FinishReason.STOP
            if token.token_id in request.sampling.stop_token_ids:
                piece.stop_reason = token.token_id
        else:
            may_stop = sequence.num_generated >= request.sampling.min_tokens
            piece.text = detokenizer.append(token.token_id, may_stop)
            if detokenizer.stop_reason is not None:
                piece.finish_reason, piece.stop_reason = FinishReason.STOP, detokenizer.stop_reason
            elif sequence.num_generated >= request.max_tokens:
                piece.finish_reason = FinishReason.LENGTH
        if piece.finish_reason is not None:
            piece.text += detokenizer.finish()
        return piece

    def _position_logprobs(self, token: SampledToken) -> PositionLogprobs:
        def named(token_id: int, logprob: float) -> TokenLogprob:
            return TokenLogprob(token_id, self.tokenizer.token_text(token_id), logprob)

        assert token.logprob is not None
        return PositionLogprobs(
            chosen=named(token.token_id, token.logprob),
            top=tuple(named(*alternative) for alternative in token.top or ()),
        )

    def _output(self, sequence: Sequence) -> RequestOutput:
        request = sequence.request
        return RequestOutput(
            request_id=request.request_id,
            num_prompt_tokens=sequence.prompt_length,
            num_cached_tokens=sequence.num_cached,
            activation=request.activation,
            seed=request.seed,
            samples=[],
            queue_seconds=sequence.queue_seconds or 0.0,
        )

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._scheduler.has_work

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for admission."""
        return len(self._scheduler.waiting)

    def pin_threads(self) -> bool:
        """Give each compute thread, the calling one among them, a core of its own, if there are as many as cores.

        Returns:
            Whether they have them; a GPU and the reference kernels need none.
        """
        return self._runner.backend.pin_threads()

    def stats(self) -> EngineStats:
        """Snapshot of all counters. Any thread may call it; figures may be one step apart from each other."""
        zeros, elements = self._runner.backend.sparsity.by_mode()
        pool, scheduler, runner = self._pool, self._scheduler, self._runner
        draws, work = runner.backend.draws, runner.work
        phases = {str(phase): seconds for phase, seconds in runner.clock.seconds.items()}
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_blocks_total=pool.num_blocks,
            kv_blocks_used=pool.num_blocks - pool.num_free,
            kv_blocks_cached=pool.num_cached,
            prompt_tokens=self._prompt_tokens,
            cached_prompt_tokens=self._cached_prompt_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=scheduler.num_preemptions,
            aborted=self._aborted,
            steps=self._steps,
            step_seconds=sum(phases.values()),
            prefix_cache_queries=scheduler.cache_queries,
            prefix_cache_hits=scheduler.cache_hits,
            ffn_zeros=zeros,
            ffn_elements=elements,
            ffn_rows=dict(runner.ffn_rows),
            ffn_neurons={"read": work.neurons_read, "skipped": work.neurons_skipped},
            ffn_flops={mode: work.dense_flops(sum(counts)) for mode, counts in elements.items()},
            ffn_flops_skipped=work.flops_skipped,
            weight_bytes_read=work.weight_bytes,
            negatives=draws.negatives,
            negatives_kept=draws.kept,
            negatives_expected=draws.expected,
            phase_seconds=phases,
        )


def _end_waiting(plan: StepPlan) -> None:
    """Note how long the sequences waited that a plan holds for the first time."""
    for item in plan.scheduled:
        sequence = item.sequence
        if sequence.queue_seconds is None:
            sequence.queue_seconds = time.monotonic() - sequence.request.arrival


def _check_config(config: EngineConfig) -> None:
    for name in ("max_num_seqs", "max_num_batched_tokens", "max_waiting", "kv_cache_mib", "max_model_len", "threads"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InvalidConfig(f"{name} must be at least 1, got {value}")
    if config.quantize is not Quantization.NONE and config.kernels in (KernelSet.REFERENCE, KernelSet.TRITON):
        raise InvalidConfig(f"quantize must be 'none' with the {config.kernels} kernels, got '{config.quantize}'")
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise InvalidConfig(
            f"max_num_batched_tokens ({config.max_num_batched_tokens}) must be at least max_num_seqs "
            f"({config.max_num_seqs}), so that each running sequence gets its token in each step"
        )


def _dtype(dtype: DType) -> torch.dtype:
    return torch.float32 if dtype is DType.FLOAT32 else torch.bfloat16


def _size_cache(config: EngineConfig, checkpoint: Checkpoint) -> tuple[int, int]:
    """Number of KV blocks and the longest sequence, which must fit into them."""
    longest = checkpoint.config.max_position
    if config.max_model_len is not None and config.max_model_len > longest:
        raise InvalidConfig(f"max_model_len {config.max_model_len} exceeds the model's context of {longest} tokens")
    wanted = config.max_model_len or longest
    in_memory = config.kv_cache_mib * 2**20 // block_bytes(checkpoint.config, checkpoint.weights.embedding.dtype)
    num_blocks = min(in_memory, config.max_num_seqs * blocks_for(wanted))
    if num_blocks < 1 or (config.max_model_len is not None and num_blocks < blocks_for(wanted)):
        raise InvalidConfig(
            f"kv_cache_mib {config.kv_cache_mib} holds {in_memory * BLOCK_SIZE} tokens, "
            f"less than one sequence of {wanted}"
        )
    return num_blocks, min(wanted, num_blocks * BLOCK_SIZE)


def _digest(tensors: Iterable[torch.Tensor], quantization: Quantization) -> str:
    """A name for these weights, made from a few thousand numbers of each tensor, and for their quantisation."""
    digest = hashlib.sha256(quantization.encode())
    for tensor in tensors:
        step = tensor.numel() // 4096 | 1  # odd, for a multiple of the width would meet the same columns in each row
        digest.update(tensor.reshape(-1)[::step].float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _describe(
    checkpoint: Checkpoint,
    runner: Runner,
    *,
    quantization: Quantization,
    weights_digest: str,
    num_blocks: int,
    max_model_len: int,
    threads: int,
    device: torch.device,
) -> ModelInfo:
    config, dtype = checkpoint.config, checkpoint.weights.embedding.dtype
    return ModelInfo(
        name=checkpoint.name,
        adapter=checkpoint.adapter.resolve().name if checkpoint.adapter else None,
        architecture=config.architecture,
        vocab_size=config.vocab_size,
        max_model_len=max_model_len,
        dtype=str(dtype).removeprefix("torch."),
        quantization=str(quantization),
        support=checkpoint.support,
        quality=checkpoint.quality,
        num_parameters=checkpoint.num_parameters,
        weight_bytes=runner.backend.weight_bytes,
        weights_digest=weights_digest,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_kv_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        kv_cache_bytes=num_blocks * block_bytes(config, dtype),
        threads=threads,
        device=device_name(device),
        kernels=runner.backend.describe(),
    )
