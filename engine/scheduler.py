"""Decides what runs in the next step. Pure bookkeeping: no tensors, no clock, no model."""

from collections import deque
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.kv_cache import BLOCK_SIZE, blocks_for
from engine.request import Fingerprint, Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Tokens `start` to `start + count` of a sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    count: int
    samples: bool  # the step reaches the sequence's end, so that its next token is drawn

    @property
    def score_token_ids(self) -> list[int]:
        """Of a prompt that is scored the tokens that follow these, one each, but for the prompt's last; else none."""
        if not self.sequence.request.scores_prompt:
            return []
        return self.sequence.token_ids[self.start + 1 : self.start + self.count + 1]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes."""

    scheduled: tuple[ScheduledSequence, ...]

    @property
    def num_tokens(self) -> int:
        """Token rows of the step."""
        return sum(item.count for item in self.scheduled)


class Scheduler:
    """Continuous batching: first come, first served, one policy for prompts and generated tokens.

    A step has a budget of tokens. Running sequences that only need their next token come first, so that no prompt
    stalls them; what is left goes to unfinished prompts, in chunks; then waiting sequences are admitted. When a running
    sequence needs a block and none is free, the one admitted last gives up all its blocks and waits again, at the
    front. Its tokens are kept and computed again later: nothing is lost, and draws do not change because they depend on
    positions.

    Args:
        pool: The blocks. A single sequence of the longest allowed length must fit, which the engine sees to.
        max_num_seqs: Most running sequences.
        max_num_batched_tokens: Budget of a step, at least `max_num_seqs`.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.cache_queries = 0  # tokens looked up in the prefix cache
        self.cache_hits = 0  # tokens found there

    @property
    def has_work(self) -> bool:
        """Whether any sequence runs or waits."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence, wherever it is, and release its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def schedule(self) -> StepPlan:
        """Plan the next step and give its sequences the blocks they need.

        Full blocks are registered with the prefix cache at once: a step writes all keys and values of a layer before
        any row attends, so a sequence admitted in the same step can already share them. The plan must therefore be run,
        or else abandoned.
        """
        budget = self.max_num_batched_tokens
        scheduled: list[ScheduledSequence] = []
        # A sequence that was due in the first round misses nothing in the second.
        for decoding in (True, False):
            for sequence in list(self.running):
                missing = len(sequence.token_ids) - sequence.num_computed
                is_due = missing == 1 if decoding else missing > 1
                if not is_due or budget == 0 or sequence not in self.running:
                    continue
                count = min(missing, budget)
                if self._make_room(sequence, sequence.num_computed + count):
                    scheduled.append(self._commit(sequence, count))
                    budget -= count
        while budget > 0 and self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            count = min(len(sequence.token_ids) - sequence.num_computed, budget)
            scheduled.append(self._commit(sequence, count))
            budget -= count
        return StepPlan(tuple(scheduled))

    def abandon(self, plan: StepPlan) -> None:
        """Undo a plan that failed on its way: none of it counts as computed, and all running sequences wait again."""
        for item in plan.scheduled:
            for block in item.sequence.block_ids[item.start // BLOCK_SIZE :]:
                self.pool.forget(block)
        while self.running:
            self._suspend_last()

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence blocks for its first `num_tokens` tokens, preempting others; False if it must go."""
        needed = blocks_for(num_tokens) - len(sequence.block_ids)
        while needed > self.pool.num_free:
            self.num_preemptions += 1
            if self._suspend_last() is sequence:
                return False
        if needed > 0:
            sequence.block_ids += self.pool.allocate(needed)
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its cached beginning, and blocks for all its other tokens, if there are enough."""
        found = self._cached_blocks(sequence)
        taken = sum(self.pool.is_free(block) for block, _ in found)
        needed = blocks_for(len(sequence.token_ids)) - len(found)
        if needed + taken > self.pool.num_free:
            return False
        for block, name in found:
            self.pool.hold(block)
            sequence.cache_parent = name
        sequence.block_ids = [block for block, _ in found] + self.pool.allocate(needed)
        sequence.num_registered = len(found)
        sequence.num_computed = len(found) * BLOCK_SIZE
        if not sequence.was_admitted:  # later it finds what it computed itself
            sequence.was_admitted = True
            sequence.num_cached = sequence.num_computed
        if self._looks_up(sequence):
            self.cache_queries += len(sequence.token_ids)
            self.cache_hits += sequence.num_computed
        return True

    def _looks_up(self, sequence: Sequence) -> bool:
        """Whether the prefix cache can help: it has keys and values, but no logits for a prompt that is scored."""
        return self.pool.prefix_caching and not sequence.request.scores_prompt

    def _cached_blocks(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Blocks of the longest cached beginning, with the names of their contents."""
        found: list[tuple[int, int]] = []
        parent = 0
        # The last token is always computed: its logits are needed.
        for index in range((len(sequence.token_ids) - 1) // BLOCK_SIZE if self._looks_up(sequence) else 0):
            match = self.pool.match(parent, *_content(sequence, index))
            if match is None:
                break
            found.append(match)
            parent = match[1]
        return found

    def _commit(self, sequence: Sequence, count: int) -> ScheduledSequence:
        """Count `count` more tokens as computed and register the blocks that become full."""
        start = sequence.num_computed
        sequence.num_computed += count
        for index in range(sequence.num_registered, sequence.num_computed // BLOCK_SIZE):
            block = sequence.block_ids[index]
            sequence.cache_parent = self.pool.register(block, sequence.cache_parent, *_content(sequence, index))
            sequence.num_registered = index + 1
        at_end = sequence.num_computed == len(sequence.token_ids)
        return ScheduledSequence(sequence, start, count, samples=at_end and not sequence.request.scores_prompt)

    def _suspend_last(self) -> Sequence:
        """Let the sequence that was admitted last wait again, at the front."""
        sequence = self.running.pop()
        self._release(sequence)
        self.waiting.appendleft(sequence)
        return sequence

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = sequence.num_registered = sequence.cache_parent = 0


def _content(sequence: Sequence, block: int) -> tuple[tuple[int, ...], Fingerprint]:
    tokens = tuple(sequence.token_ids[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE])
    return tokens, sequence.fingerprint(block)
