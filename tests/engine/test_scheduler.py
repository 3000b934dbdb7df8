"""The policy, one rule a test. That random workloads break none of them: test_scheduler_plans.py."""

import pytest

from engine.activation import Activation, Scope
from engine.kv_cache import BLOCK_SIZE
from engine.request import Sequence
from engine.scheduler import StepPlan
from tests.engine.simulation import RELU, RELU_DECODE, SILU, Simulation, make_sequences, stochastic

A_BLOCK = [1] * BLOCK_SIZE
PROMPT = A_BLOCK * 2 + [2]  # two blocks that can be shared, and a token that is always computed


def sequence(prompt: list[int], activation: Activation = SILU, max_tokens: int = 50) -> Sequence:
    return make_sequences(prompt, activation, max_tokens)[0]


def rows(plan: StepPlan) -> list[tuple[Sequence, int, int]]:
    return [(item.sequence, item.start, item.count) for item in plan.scheduled]


def prompt_of(length: int, first: int = 0) -> list[int]:
    """A prompt that shares nothing with one of another `first`."""
    return [first, *range(1000, 999 + length)]


class TestBatching:
    def test_a_prompt_is_computed_in_one_step_if_it_fits(self):
        simulation = Simulation(num_blocks=10)
        one = sequence(prompt_of(20))
        simulation.add(one)

        plan = simulation.step()

        assert rows(plan) == [(one, 0, 20)]
        assert plan.scheduled[0].samples

    def test_then_one_token_a_step(self):
        simulation = Simulation(num_blocks=10)
        one = sequence(prompt_of(20))
        simulation.add(one)
        simulation.step()

        assert rows(simulation.step()) == [(one, 20, 1)]
        assert rows(simulation.step()) == [(one, 21, 1)]

    def test_a_request_joins_the_running_batch_at_the_next_step(self):
        simulation = Simulation(num_blocks=10)
        one, two = sequence(prompt_of(20)), sequence(prompt_of(30, first=1))
        simulation.add(one)
        simulation.step()
        simulation.add(two)

        assert rows(simulation.step()) == [(one, 20, 1), (two, 0, 30)]

    def test_a_finished_sequence_leaves_its_place_to_the_next(self):
        simulation = Simulation(num_blocks=10, max_num_seqs=1)
        one, two = sequence(prompt_of(5), max_tokens=1), sequence(prompt_of(6, first=1))
        simulation.add(one, two)

        assert rows(simulation.step()) == [(one, 0, 5)]
        assert rows(simulation.step()) == [(two, 0, 6)]

    def test_a_long_prompt_is_computed_in_chunks_of_the_budget(self):
        simulation = Simulation(num_blocks=10, budget=40)
        one = sequence(prompt_of(100))
        simulation.add(one)

        plans = [simulation.step() for _ in range(3)]

        assert [rows(plan) for plan in plans] == [[(one, 0, 40)], [(one, 40, 40)], [(one, 80, 20)]]
        assert [plan.scheduled[0].samples for plan in plans] == [False, False, True]

    def test_running_streams_get_their_token_before_a_long_prompt_gets_its_chunk(self):
        simulation = Simulation(num_blocks=20, budget=10, max_num_seqs=3)
        long, stream = sequence(prompt_of(100)), sequence(prompt_of(9, first=1))
        simulation.add(stream)
        simulation.step()
        simulation.add(long)

        assert rows(simulation.step()) == [(stream, 9, 1), (long, 0, 9)]
        assert rows(simulation.step()) == [(stream, 10, 1), (long, 9, 9)]

    def test_a_stream_that_was_admitted_after_a_long_prompt_goes_before_it(self):
        simulation = Simulation(num_blocks=20, budget=32, max_num_seqs=3)
        long, short = sequence(prompt_of(60)), sequence(prompt_of(4, first=1))
        simulation.add(long, short)
        simulation.step()
        assert rows(simulation.step()) == [(long, 32, 28), (short, 0, 4)]
        late = sequence(prompt_of(60, first=2))
        simulation.add(late)
        simulation.step()

        assert rows(simulation.step()) == [(long, 61, 1), (short, 5, 1), (late, 30, 30)]

    def test_prompts_are_served_in_the_order_they_came(self):
        simulation = Simulation(num_blocks=20, budget=50)
        first, second, third = (sequence(prompt_of(40, first=index)) for index in range(3))
        simulation.add(first, second, third)

        assert rows(simulation.step()) == [(first, 0, 40), (second, 0, 10)]
        assert rows(simulation.step()) == [(first, 40, 1), (second, 10, 30), (third, 0, 19)]

    def test_not_more_sequences_run_than_allowed(self):
        simulation = Simulation(num_blocks=20, max_num_seqs=2)
        sequences = [sequence(prompt_of(3, first=index)) for index in range(3)]
        simulation.add(*sequences)

        simulation.step()

        assert simulation.scheduler.running == sequences[:2]
        assert list(simulation.scheduler.waiting) == sequences[2:]

    def test_without_work_there_is_nothing_to_schedule(self):
        scheduler = Simulation(num_blocks=1).scheduler
        assert not scheduler.has_work
        assert scheduler.schedule().scheduled == ()


class TestBlocks:
    def test_admission_waits_until_there_are_blocks_for_the_whole_prompt(self):
        simulation = Simulation(num_blocks=4)
        first, second = sequence(prompt_of(40), max_tokens=3), sequence(prompt_of(20, first=1))
        simulation.add(first, second)

        assert rows(simulation.step()) == [(first, 0, 40)]
        simulation.step()
        assert rows(simulation.step()) == [(first, 41, 1)]
        assert rows(simulation.step()) == [(second, 0, 20)]

    def test_a_short_request_does_not_overtake_a_long_one_that_waits_for_blocks(self):
        simulation = Simulation(num_blocks=4)
        running, long, short = (sequence(prompt_of(length, first=length)) for length in (40, 33, 2))
        simulation.add(running, long, short)

        simulation.step()

        assert list(simulation.scheduler.waiting) == [long, short]

    def test_a_prompt_takes_its_blocks_at_admission_and_a_text_takes_them_one_by_one(self):
        simulation = Simulation(num_blocks=10, budget=16)
        one = sequence(prompt_of(47))
        simulation.add(one)

        simulation.step()
        assert len(one.block_ids) == 3
        while one.num_computed < 48:
            simulation.step()
        assert len(one.block_ids) == 3
        simulation.step()
        assert len(one.block_ids) == 4

    def test_the_last_admitted_is_preempted_and_waits_at_the_front(self):
        simulation = Simulation(num_blocks=3)
        first, second, third = (sequence(prompt_of(16, first=index)) for index in range(3))
        late = sequence(prompt_of(5, first=9))
        simulation.add(first, second, third, late)
        simulation.step()

        plan = simulation.step()  # the first needs a second block

        assert rows(plan) == [(first, 16, 1)]
        assert list(simulation.scheduler.waiting) == [second, third, late]
        assert simulation.scheduler.num_preemptions == 2

    def test_a_sequence_that_was_admitted_last_preempts_itself(self):
        simulation = Simulation(num_blocks=3)
        first, second = sequence(prompt_of(20)), sequence(prompt_of(16, first=1))
        simulation.add(first, second)
        simulation.step()

        assert rows(simulation.step()) == [(first, 20, 1)]
        assert list(simulation.scheduler.waiting) == [second]

    def test_a_preempted_sequence_keeps_its_tokens_and_computes_them_again(self):
        simulation = Simulation(num_blocks=3, prefix_caching=False)
        first, second = sequence(prompt_of(16), max_tokens=2), sequence(prompt_of(30, first=1))
        simulation.add(first, second)
        simulation.step()
        tokens = list(second.token_ids)
        assert second.num_generated == 1

        simulation.step()
        assert (second.token_ids, second.num_computed, second.block_ids) == (tokens, 0, [])

        assert rows(simulation.step()) == [(second, 0, 31)]

    def test_finishing_frees_everything_wherever_the_sequence_is(self):
        simulation = Simulation(num_blocks=5, max_num_seqs=1)
        running, waiting = sequence(prompt_of(40)), sequence(prompt_of(40, first=1))
        simulation.add(running, waiting)
        simulation.step()

        simulation.finish(waiting)
        simulation.finish(running)

        assert simulation.pool.num_free == 5
        assert not simulation.scheduler.has_work

    def test_finishing_twice_is_harmless(self):
        simulation = Simulation(num_blocks=5)
        one = sequence(prompt_of(40))
        simulation.add(one)
        simulation.step()

        simulation.finish(one)
        simulation.finish(one)

        assert simulation.pool.num_free == 5

    def test_a_holder_that_leaves_does_not_free_what_others_share(self):
        simulation = Simulation(num_blocks=5)
        first, second = sequence(PROMPT), sequence(PROMPT)
        simulation.add(first, second)
        simulation.step()
        assert first.block_ids[:2] == second.block_ids[:2]

        simulation.finish(first)

        assert simulation.pool.num_free == 5 - 3
        simulation.step()


class TestPrefixCache:
    def test_requests_of_one_step_share(self):
        simulation = Simulation(num_blocks=10)
        first, second = sequence(PROMPT), sequence(PROMPT)
        simulation.add(first, second)

        assert rows(simulation.step()) == [(first, 0, 33), (second, 32, 1)]
        assert second.num_cached == 32

    def test_a_request_shares_with_one_that_is_finished(self):
        simulation = Simulation(num_blocks=10)
        first, second = sequence(PROMPT, max_tokens=1), sequence(PROMPT)
        simulation.add(first)
        simulation.run()
        simulation.add(second)

        assert rows(simulation.step()) == [(second, 32, 1)]

    def test_only_the_common_beginning_is_shared(self):
        simulation = Simulation(num_blocks=10)
        first, second = sequence(A_BLOCK * 3), sequence([*A_BLOCK, 9, *A_BLOCK, *A_BLOCK])
        simulation.add(first, second)

        assert rows(simulation.step()) == [(first, 0, 48), (second, 16, 33)]

    def test_a_half_full_block_is_not_shared(self):
        simulation = Simulation(num_blocks=10)
        first, second = sequence([1] * 31), sequence([1] * 31)
        simulation.add(first, second)

        assert rows(simulation.step()) == [(first, 0, 31), (second, 16, 15)]

    @pytest.mark.parametrize("length", [1, 16, 32, 33])
    def test_the_last_token_is_always_computed(self, length):
        simulation = Simulation(num_blocks=10)
        first, second = sequence([1] * length), sequence([1] * length)
        simulation.add(first, second)

        item = simulation.step().scheduled[1]

        assert item.count >= 1
        assert item.samples
        assert item.start == (length - 1) // BLOCK_SIZE * BLOCK_SIZE

    def test_generated_tokens_are_shared_with_the_next_turn_of_a_conversation(self):
        simulation = Simulation(num_blocks=10)
        first = sequence([1] * 20, max_tokens=30)
        simulation.add(first)
        simulation.run()
        assert len(first.token_ids) == 50
        second = sequence([*first.token_ids, 1, 1])
        simulation.add(second)

        assert rows(simulation.step()) == [(second, 48, 4)]

    def test_a_preempted_sequence_finds_its_own_blocks_but_does_not_count_them_as_cached(self):
        simulation = Simulation(num_blocks=5)
        first, second = sequence(prompt_of(32), max_tokens=2), sequence(prompt_of(40, first=1))
        simulation.add(first, second)
        simulation.step()
        simulation.step()
        assert list(simulation.scheduler.waiting) == [second]

        assert rows(simulation.step()) == [(second, 32, 9)]
        assert second.num_cached == 0

    def test_the_least_recently_used_prompt_is_evicted_first(self):
        simulation = Simulation(num_blocks=5)
        prompts = [prompt_of(33, first=index) for index in range(3)]
        for index in (0, 1, 0, 2):  # 2 needs what 1 had, because 0 was used again
            simulation.add(sequence(prompts[index], max_tokens=1))
            simulation.run()
        zero, one = sequence(prompts[0], max_tokens=1), sequence(prompts[1], max_tokens=1)
        simulation.add(zero)
        assert rows(simulation.step()) == [(zero, 32, 1)]
        simulation.add(one)
        assert rows(simulation.step()) == [(one, 0, 33)]

    def test_a_prompt_loses_its_end_before_its_beginning(self):
        simulation = Simulation(num_blocks=4)
        simulation.add(sequence(prompt_of(49), max_tokens=1))
        simulation.run()
        simulation.add(sequence(prompt_of(20, first=1), max_tokens=1))
        simulation.run()
        again = sequence(prompt_of(49))
        simulation.add(again)

        assert rows(simulation.step()) == [(again, 32, 17)]

    def test_hits_and_queries_are_counted_in_tokens(self):
        simulation = Simulation(num_blocks=10)
        simulation.add(sequence(PROMPT), sequence(PROMPT))

        simulation.step()

        assert (simulation.scheduler.cache_queries, simulation.scheduler.cache_hits) == (66, 32)

    def test_switched_off_nothing_is_shared_nor_counted(self):
        simulation = Simulation(num_blocks=10, prefix_caching=False)
        first, second = sequence(PROMPT), sequence(PROMPT)
        simulation.add(first, second)

        assert rows(simulation.step()) == [(first, 0, 33), (second, 0, 33)]
        assert (simulation.scheduler.cache_queries, simulation.scheduler.cache_hits) == (0, 0)

    def test_a_step_that_failed_leaves_nothing_to_be_found(self):
        simulation = Simulation(num_blocks=10)
        one, two = sequence(PROMPT), sequence(PROMPT)
        simulation.add(one, two)

        simulation.step(fails=True)

        assert list(simulation.scheduler.waiting) == [one, two]
        assert (simulation.pool.num_free, simulation.pool.num_cached) == (10, 0)
        assert rows(simulation.step()) == [(one, 0, 33), (two, 32, 1)]

    def test_a_step_that_failed_leaves_what_earlier_steps_computed(self):
        simulation = Simulation(num_blocks=10, budget=32)
        one = sequence(prompt_of(60))
        simulation.add(one)
        simulation.step()

        simulation.step(fails=True)

        assert rows(simulation.step()) == [(one, 32, 28)]


class TestSharingBetweenActivations:
    """`computed` is what the second of two requests with the same prompt has to compute itself."""

    @staticmethod
    def computed(first: Activation, second: Activation) -> int:
        simulation = Simulation(num_blocks=10)
        simulation.add(sequence(PROMPT, first), sequence(PROMPT, second))
        return simulation.step().scheduled[1].count

    @pytest.mark.parametrize(
        "activation",
        [SILU, RELU, stochastic(), stochastic(scope=Scope.DECODE), RELU_DECODE],
        ids=lambda activation: f"{activation.mode}-{activation.scope}",
    )
    def test_the_same_activation_shares(self, activation):
        assert self.computed(activation, activation) == 1

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (SILU, RELU),
            (SILU, stochastic()),
            (RELU, stochastic(p=0.0)),
            (SILU, stochastic(p=1.0)),
            (stochastic(p=0.8), stochastic(p=0.7)),
            (stochastic(seed=1), stochastic(seed=2)),
            (stochastic(scope=Scope.ALL), stochastic(scope=Scope.DECODE)),
            (RELU, RELU_DECODE),
        ],
        ids=["mode", "mode-2", "p=0 is not relu", "p=1 is not silu", "p", "seed", "scope", "relu-scope"],
    )
    def test_different_activations_do_not(self, first, second):
        assert self.computed(first, second) == len(PROMPT)
        assert self.computed(second, first) == len(PROMPT)

    @pytest.mark.parametrize(
        "activation",
        [stochastic(scope=Scope.DECODE), stochastic(seed=2, scope=Scope.DECODE), RELU_DECODE],
    )
    def test_prompts_of_scope_decode_are_silu_prompts(self, activation):
        assert self.computed(SILU, activation) == 1
        assert self.computed(activation, SILU) == 1
        assert self.computed(activation, stochastic(p=0.3, scope=Scope.DECODE)) == 1

    @pytest.mark.parametrize(
        ("activation", "computed"),
        [
            (SILU, [33, 1, 1]),
            (RELU, [33, 1, 1]),
            (stochastic(), [33, 33, 33]),
            (stochastic(scope=Scope.DECODE), [33, 1, 1]),
        ],
        ids=["silu", "relu", "stochastic", "stochastic-decode"],
    )
    def test_samples_share_the_prompt_unless_each_draws_on_it(self, activation, computed):
        simulation = Simulation(num_blocks=20)
        simulation.add(*make_sequences(PROMPT, activation, n=3))

        assert [item.count for item in simulation.step().scheduled] == computed

    @pytest.mark.parametrize("activation", [stochastic(scope=Scope.DECODE), RELU_DECODE])
    def test_tokens_generated_in_scope_decode_are_not_those_of_a_prompt(self, activation):
        simulation = Simulation(num_blocks=20)
        first = sequence([1] * 16, activation, max_tokens=40)
        simulation.add(first)
        simulation.run()
        for again in (SILU, activation):  # both run these tokens with SILU, as part of a prompt
            second = sequence(first.token_ids, again, max_tokens=1)
            simulation.add(second)
            assert rows(simulation.step())[0][1] == (16 if again is SILU else 48)

    @pytest.mark.parametrize("activation", [SILU, RELU], ids=["silu", "relu"])
    def test_generated_tokens_are_shared_with_a_prompt(self, activation):
        simulation = Simulation(num_blocks=20)
        first = sequence([1] * 16, activation, max_tokens=40)
        simulation.add(first)
        simulation.run()
        second = sequence(first.token_ids, activation)
        simulation.add(second)

        assert rows(simulation.step()) == [(second, 48, 8)]

    def test_generated_relu_tokens_are_found_again_after_preemption(self):
        simulation = Simulation(num_blocks=8)
        first, second = sequence(prompt_of(32), RELU), sequence(prompt_of(17, first=1), RELU)
        simulation.add(first, second)
        while not simulation.scheduler.num_preemptions:
            simulation.step()
        simulation.finish(first)

        assert rows(simulation.step()) == [(second, 48, 2)]
