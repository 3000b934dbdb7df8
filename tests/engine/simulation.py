"""A stand-in for model and engine: runs a scheduler's plans and checks that each of them is sound.

No model: a token is a function of the one before it, and the KV cache holds, instead of numbers, what numbers depend
on. So a wrong cache hit shows at once as a wrong entry, whatever the scheduler believes.
"""

from dataclasses import dataclass, field
from typing import Any

from engine.activation import Activation, ActivationMode, Scope
from engine.block_pool import BlockPool
from engine.kv_cache import BLOCK_SIZE, blocks_for
from engine.request import Request, Sequence
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledSequence, Scheduler, StepPlan

SILU = Activation()
RELU = Activation(ActivationMode.RELU)
RELU_DECODE = Activation(ActivationMode.RELU, scope=Scope.DECODE)
VOCABULARY = 3


def stochastic(p: float = 0.8, seed: int = 1, scope: Scope = Scope.ALL) -> Activation:
    return Activation(ActivationMode.STOCHASTIC, p=p, seed=seed, scope=scope)


def make_sequences(prompt: list[int], activation: Activation = SILU, max_tokens: int = 8, n: int = 1) -> list[Sequence]:
    """The samples of a request as the engine makes them."""
    sampling = SamplingParams(max_tokens=max_tokens, n=n, seed=7)
    request = Request.create("request", prompt, sampling, activation, max_model_len=100_000)
    return [Sequence(request, index, end_token_ids=()) for index in range(n)]


def make_scored(prompt: list[int], activation: Activation = SILU) -> Sequence:
    """The sequence of a prompt whose log-probabilities are wanted."""
    return Sequence(Request.scoring("request", prompt, activation), 0, end_token_ids=())


def activation_at(sequence: Sequence, position: int) -> tuple[Any, ...]:
    """How a token is activated, written down from the request alone: all that its keys and values depend on beside the
    tokens up to it."""
    activation, generated = sequence.request.activation, position >= sequence.prompt_length
    if activation.mode is ActivationMode.SILU or (activation.scope is Scope.DECODE and not generated):
        return ("silu",)
    if activation.mode is ActivationMode.RELU:
        return ("relu",)
    return ("stochastic", activation.p, activation.seed, sequence.index)


class States:
    """Numbers for histories of (token, activation): equal if, and only if, all of the history is equal."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[Any, ...], int] = {}

    def after(self, state: int, token: int, activation: tuple[Any, ...]) -> int:
        return self._numbers.setdefault((state, token, activation), len(self._numbers) + 1)


@dataclass
class Block:
    """A cache block: who may write it and what is in it."""

    writer: Sequence
    entries: list[int] = field(default_factory=list)


@dataclass
class Admission:
    """What the simulation remembers of a running sequence."""

    num_computed: int
    block_ids: list[int]


class Simulation:
    """Drives a scheduler step by step, as the engine does, and checks every plan.

    Args:
        num_blocks: Size of the pool.
        max_num_seqs: As in `Scheduler`.
        budget: `max_num_batched_tokens` of the scheduler.
        prefix_caching: As in `BlockPool`.
    """

    def __init__(self, num_blocks: int, max_num_seqs: int = 8, budget: int = 256, prefix_caching: bool = True) -> None:
        self.pool = BlockPool(num_blocks, prefix_caching)
        self.scheduler = Scheduler(self.pool, max_num_seqs, budget)
        self.arrived: list[Sequence] = []
        self.gone: set[Sequence] = set()
        self.scored: dict[Sequence, list[int]] = {}  # tokens that have a log-probability
        self._states = States()
        self._histories: dict[Sequence, list[int]] = {}  # state after each token
        self._admissions: dict[Sequence, Admission] = {}
        self._blocks: dict[int, Block] = {}

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.scheduler.add(sequence)
            self.arrived.append(sequence)
            self._histories[sequence] = []
            self._extend_history(sequence)

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self.gone.add(sequence)
        self._admissions.pop(sequence, None)
        self._check_books()

    def step(self, fails: bool = False) -> StepPlan:
        """One step of the engine: plan, compute, append the tokens that were drawn, finish who is done.

        One that fails computes nothing and abandons its plan.
        """
        due = [s for s in self.scheduler.running if len(s.token_ids) - s.num_computed == 1]
        plan = self.scheduler.schedule()
        self._check_plan(plan, due)
        if fails:
            self.scheduler.abandon(plan)
            self._admissions.clear()
            self._check_books()
            return plan
        self._compute(plan)
        for item in plan.scheduled:
            if item.samples:
                self._append_token(item.sequence)
            elif item.sequence.request.scores_prompt:
                self._take_scores(item)
        self._check_books()
        return plan

    def run(self) -> None:
        """Step until nothing is left to do. Every step must do something, so this ends."""
        while self.scheduler.has_work:
            self.step()

    def _extend_history(self, sequence: Sequence) -> None:
        history = self._histories[sequence]
        for position in range(len(history), len(sequence.token_ids)):
            before = history[-1] if history else 0
            token, activation = sequence.token_ids[position], activation_at(sequence, position)
            history.append(self._states.after(before, token, activation))

    def _append_token(self, sequence: Sequence) -> None:
        assert sequence.num_computed == len(sequence.token_ids)
        # Whatever the activation: then only its part of a cache key can tell equal texts apart.
        sequence.token_ids.append((sequence.token_ids[-1] + 1) % VOCABULARY)
        self._extend_history(sequence)
        if sequence.num_generated == sequence.request.max_tokens:
            self.finish(sequence)

    def _take_scores(self, item: ScheduledSequence) -> None:
        sequence = item.sequence
        scored = self.scored.setdefault(sequence, [])
        del scored[item.start :]
        scored += item.score_token_ids
        if item.start + item.count == sequence.prompt_length:
            assert scored == sequence.token_ids[1:], "a token has no log-probability, or another one's"
            self.finish(sequence)

    def _check_plan(self, plan: StepPlan, due: list[Sequence]) -> None:
        scheduler = self.scheduler
        sequences = [item.sequence for item in plan.scheduled]
        assert sequences, "there was work, and the step does none"
        assert len(set(sequences)) == len(sequences), "scheduled twice"
        assert set(sequences) <= set(scheduler.running)
        assert plan.num_tokens <= scheduler.max_num_batched_tokens
        assert len(scheduler.running) <= scheduler.max_num_seqs
        for item in plan.scheduled:
            assert item.count >= 1
            at_end = item.start + item.count == len(item.sequence.token_ids)
            assert item.samples == (at_end and not item.sequence.request.scores_prompt)

        served = [s for s in due if s in scheduler.running]
        assert set(served) <= set(sequences), "a running stream was stalled"
        kept = [item for item in plan.scheduled if not self._is_admission(item)]
        assert [item.sequence for item in kept if item.sequence in due] == [item.sequence for item in kept][
            : sum(item.sequence in due for item in kept)
        ], "a prompt came before a stream"

        spare = plan.num_tokens < scheduler.max_num_batched_tokens
        if spare and scheduler.waiting and len(scheduler.running) < scheduler.max_num_seqs:
            head = scheduler.waiting[0]
            assert blocks_for(len(head.token_ids)) > self.pool.num_free, "a sequence waits although there is room"

    def _is_admission(self, item: ScheduledSequence) -> bool:
        """Whether a sequence was admitted in this step, be it again."""
        known = self._admissions.get(item.sequence)
        if known is None or item.start != known.num_computed:
            return True
        return item.sequence.block_ids[: len(known.block_ids)] != known.block_ids

    def _compute(self, plan: StepPlan) -> None:
        """Write all of a step's entries, then read what its rows attend to; as a layer of the model does."""
        for sequence in set(self._admissions) - set(self.scheduler.running):
            del self._admissions[sequence]  # preempted
        written: set[tuple[int, int]] = set()
        for item in plan.scheduled:
            self._take_blocks(item)
            for position in range(item.start, item.start + item.count):
                self._write(item.sequence, position, written)
        for item in plan.scheduled:
            self._read(item.sequence, item.start + item.count)

    def _take_blocks(self, item: ScheduledSequence) -> None:
        sequence = item.sequence
        if self._is_admission(item):
            assert item.start % BLOCK_SIZE == 0, "not all of a prefix hit is whole blocks"
            assert item.start < len(sequence.token_ids), "the last token was not computed"
            assert item.start == 0 or not sequence.request.scores_prompt, "cached tokens have no log-probabilities"
            fresh = sequence.block_ids[item.start // BLOCK_SIZE :]
        else:
            fresh = sequence.block_ids[len(self._admissions[sequence].block_ids) :]
        for block in fresh:
            holders = [other for other in self.scheduler.running if block in other.block_ids]
            # One that was admitted after it in this very step may share it already, but never write it.
            assert all(other is sequence or other not in self._admissions for other in holders), "taken from its holder"
            self._blocks[block] = Block(sequence)
        self._admissions[sequence] = Admission(item.start + item.count, list(sequence.block_ids))

    def _write(self, sequence: Sequence, position: int, written: set[tuple[int, int]]) -> None:
        number, offset = sequence.block_ids[position // BLOCK_SIZE], position % BLOCK_SIZE
        assert (number, offset) not in written, "two rows write the same place"
        written.add((number, offset))
        block = self._blocks[number]
        assert block.writer is sequence, "a shared block was written"
        assert len(block.entries) == offset, "a place was left out or written again"
        block.entries.append(self._histories[sequence][position])

    def _read(self, sequence: Sequence, length: int) -> None:
        assert len(set(sequence.block_ids)) == len(sequence.block_ids)
        cached: list[int] = []
        for block in sequence.block_ids[: blocks_for(length)]:
            cached += self._blocks[block].entries
        assert cached[:length] == self._histories[sequence][:length], "attends to something else than its own past"

    def _check_books(self) -> None:
        scheduler, pool = self.scheduler, self.pool
        held = {block for sequence in scheduler.running for block in sequence.block_ids}
        assert pool.num_free + len(held) == pool.num_blocks
        for block in range(pool.num_blocks):
            assert pool.is_free(block) == (block not in held)
        assert not any(sequence.block_ids for sequence in scheduler.waiting)
        assert pool.num_cached <= pool.num_free
        alive = [sequence for sequence in self.arrived if sequence not in self.gone]
        assert [*scheduler.running, *scheduler.waiting] == alive, "lost, or not first come, first served"
