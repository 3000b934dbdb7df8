from itertools import combinations

import pytest

from engine.activation import Activation, Scope
from engine.kv_cache import BLOCK_SIZE
from engine.request import Request, Sequence
from engine.sampling_params import SamplingParams
from tests.engine.simulation import RELU, RELU_DECODE, SILU, stochastic

LIMIT = 1000
PROMPT = tuple(range(1, 41))  # two blocks and a half


def make_request(
    sampling: SamplingParams | None = None, activation: Activation = SILU, prompt: tuple[int, ...] = PROMPT
) -> Request:
    return Request.create("id", prompt, sampling or SamplingParams(seed=5), activation, LIMIT)


def make_sequence(activation: Activation = SILU, index: int = 0, prompt: tuple[int, ...] = PROMPT) -> Sequence:
    return Sequence(make_request(activation=activation, prompt=prompt), index, end_token_ids=())


class TestRequest:
    def test_a_seed_is_kept(self):
        request = make_request(SamplingParams(seed=-3))
        assert request.seed == request.sampling.seed == -3

    def test_a_missing_seed_is_drawn_anew_and_reported(self):
        requests = [make_request(SamplingParams()) for _ in range(20)]
        assert len({request.seed for request in requests}) == 20
        assert all(request.sampling.seed == request.seed for request in requests)

    def test_a_drawn_seed_survives_a_float64(self):
        seeds = [make_request(SamplingParams()).seed for _ in range(100)]
        assert all(0 <= seed < 2**53 for seed in seeds)

    def test_the_activation_falls_back_to_the_sampling_seed(self):
        assert make_request(SamplingParams(seed=5), Activation("stochastic")).activation.seed == 5
        assert make_request(SamplingParams(seed=5), stochastic(seed=6)).activation.seed == 6

    def test_with_no_seed_at_all_both_get_the_same_drawn_one(self):
        request = make_request(SamplingParams(), Activation("stochastic"))
        assert request.activation.seed == request.seed

    @pytest.mark.parametrize("activation", [SILU, RELU])
    def test_an_activation_that_draws_nothing_gets_no_seed(self, activation):
        assert make_request(activation=activation).activation == activation

    def test_without_max_tokens_the_context_is_filled(self):
        assert make_request(SamplingParams()).max_tokens == LIMIT - len(PROMPT)

    def test_max_tokens_is_capped_by_the_context(self):
        assert make_request(SamplingParams(max_tokens=10)).max_tokens == 10
        assert make_request(SamplingParams(max_tokens=LIMIT)).max_tokens == LIMIT - len(PROMPT)

    def test_repeating_a_request_with_what_it_reports_gives_the_same_request(self):
        first = make_request(SamplingParams(), Activation("stochastic", p=0.7))
        second = make_request(SamplingParams(seed=first.seed), first.activation)
        assert (second.seed, second.activation, second.sampling) == (first.seed, first.activation, first.sampling)


class TestSequence:
    def test_it_begins_as_the_prompt(self):
        sequence = make_sequence()
        assert sequence.token_ids == list(PROMPT)
        assert (sequence.prompt_length, sequence.num_generated) == (len(PROMPT), 0)
        assert (sequence.block_ids, sequence.num_computed) == ([], 0)

    def test_samples_share_no_list_of_tokens(self):
        request = make_request()
        one, two = Sequence(request, 0, ()), Sequence(request, 1, ())

        one.token_ids.append(9)

        assert (one.num_generated, two.num_generated) == (1, 0)
        assert request.prompt_token_ids == PROMPT

    def test_samples_draw_tokens_and_activations_from_streams_of_their_own(self):
        request = make_request(activation=stochastic())
        samples = [Sequence(request, index, ()) for index in range(8)]
        assert len({sample.sampling_key for sample in samples}) == 8
        assert len({sample.activation_key for sample in samples}) == 8

    @pytest.mark.parametrize("activation", [SILU, RELU])
    def test_an_activation_that_draws_nothing_has_one_key_for_all(self, activation):
        assert make_sequence(activation).activation_key == make_sequence(activation, index=1).activation_key

    def test_the_activation_begins_where_its_scope_says(self):
        assert make_sequence(stochastic()).first_active == 0
        assert make_sequence(stochastic(scope=Scope.DECODE)).first_active == len(PROMPT)


ACTIVATIONS = [
    SILU,
    RELU,
    stochastic(),
    stochastic(p=0.5),
    stochastic(p=0.0),
    stochastic(p=1.0),
    stochastic(seed=2),
    stochastic(p=1.0, seed=2),
]


class TestFingerprint:
    """Equal fingerprints mean equal keys and values, so these tests say who may share a block of the cache."""

    @pytest.mark.parametrize(("one", "two"), [*combinations(ACTIVATIONS, 2)])
    def test_different_activations_never_share(self, one, two):
        assert make_sequence(one).fingerprint(0) != make_sequence(two).fingerprint(0)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_equal_activations_share_whole_blocks_of_their_prompts(self, activation):
        longer = make_sequence(activation, prompt=(*PROMPT, 99))
        assert make_sequence(activation).fingerprint(1) == longer.fingerprint(1)

    def test_p_1_is_not_silu(self):
        # It computes the same only where the checkpoint's positive branch is SILU.
        assert make_sequence(stochastic(p=1.0)).fingerprint(0) != make_sequence(SILU).fingerprint(0)

    def test_samples_of_a_stochastic_request_do_not_share(self):
        assert make_sequence(stochastic()).fingerprint(0) != make_sequence(stochastic(), index=1).fingerprint(0)

    @pytest.mark.parametrize("activation", [SILU, RELU])
    def test_samples_of_other_requests_do(self, activation):
        assert make_sequence(activation).fingerprint(0) == make_sequence(activation, index=1).fingerprint(0)

    @pytest.mark.parametrize("activation", [stochastic(scope=Scope.DECODE), RELU_DECODE])
    def test_scope_decode_shares_the_prompt_with_silu_up_to_the_block_where_the_text_begins(self, activation):
        sequence = make_sequence(activation)
        silu = make_sequence(SILU)
        assert [sequence.fingerprint(block) == silu.fingerprint(block) for block in range(4)] == [
            True,
            True,
            False,
            False,
        ]

    def test_scope_decode_shares_all_of_a_prompt_of_whole_blocks(self):
        sequence = make_sequence(stochastic(scope=Scope.DECODE), prompt=PROMPT[: 2 * BLOCK_SIZE])
        silu = make_sequence(SILU)
        assert [sequence.fingerprint(block) == silu.fingerprint(block) for block in range(3)] == [True, True, False]

    @pytest.mark.parametrize("activation", [stochastic(scope=Scope.DECODE), RELU_DECODE])
    def test_a_block_is_not_shared_if_its_prompt_ends_elsewhere(self, activation):
        fingerprints = [make_sequence(activation, prompt=PROMPT[:length]).fingerprint(0) for length in range(1, 17)]
        assert len(set(fingerprints)) == 16

    def test_scopes_share_tokens_that_both_activate(self):
        all_tokens, generated = make_sequence(stochastic()), make_sequence(stochastic(scope=Scope.DECODE))
        assert generated.fingerprint(3) == all_tokens.fingerprint(3)
        assert generated.fingerprint(2) != all_tokens.fingerprint(2)

    @pytest.mark.parametrize("activation", [SILU, RELU, stochastic()])
    def test_tokens_of_a_prompt_are_as_good_as_generated_ones(self, activation):
        short, long = make_sequence(activation, prompt=PROMPT[:20]), make_sequence(activation)
        assert [short.fingerprint(block) for block in range(3)] == [long.fingerprint(block) for block in range(3)]
