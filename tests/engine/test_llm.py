"""The offline interface on a tiny model: what a notebook sees."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import (
    LLM,
    Activation,
    ActivationMode,
    ContextLengthExceeded,
    DType,
    EngineConfig,
    EngineStopped,
    FfnPath,
    FinishReason,
    InvalidConfig,
    InvalidRequest,
    KernelSet,
    RequestOutput,
    SamplingParams,
    UntunedActivation,
)
from engine.kv_cache import BLOCK_SIZE
from tests.engine.models.tiny import EOS_TOKEN_ID, IM_END_TOKEN_ID, make_tiny

CONTEXT = 256
VOCABULARY = 320
PROMPT = "the hat is near the tree"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
ACTIVATIONS = [
    Activation(),
    Activation("stochastic", p=0.7, seed=3),
    Activation("stochastic", p=0.7, seed=3, scope="decode"),
    Activation("relu"),
]


def mode_id(activation: Activation) -> str:
    return f"{activation.mode}-{activation.scope}"


def config(**overrides: Any) -> EngineConfig:
    settings = {"dtype": DType.FLOAT32, "kv_cache_mib": 4, "threads": 1, "allow_untuned_activations": True}
    return EngineConfig(**(settings | overrides))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-model")
    make_tiny("llama", path)
    return path


@pytest.fixture(scope="module")
def shared_llm(model: Path) -> Iterator[LLM]:
    with LLM(str(model), config=config()) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """A model for all tests; each must leave it idle."""
    yield shared_llm
    assert_idle(shared_llm)


def assert_idle(llm: LLM) -> None:
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


def params(**overrides: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 12, "ignore_eos": True, "seed": 11} | overrides))


def joined(pieces: Iterator[RequestOutput]) -> RequestOutput:
    whole = next(pieces)
    for piece in pieces:
        whole.extend(piece)
    whole.samples.sort(key=lambda sample: sample.index)
    return whole


def total(counts: dict[ActivationMode, list[int]]) -> int:
    """Of all modes and layers."""
    return sum(map(sum, counts.values()))


class TestPrompts:
    def test_a_text_gives_one_output(self, llm):
        (output,) = llm.generate(PROMPT, GREEDY)

        assert output.finished
        assert output.num_prompt_tokens == len(llm.tokenizer.encode(PROMPT))
        assert len(output.samples[0].token_ids) == 12
        assert output.samples[0].text == llm.tokenizer.decode(output.samples[0].token_ids, continuation=True)

    def test_token_ids_are_a_prompt_too(self, llm):
        (text,) = llm.generate(PROMPT, GREEDY)
        (ids,) = llm.generate(llm.tokenizer.encode(PROMPT), GREEDY)

        assert ids.samples == text.samples

    def test_several_prompts_give_outputs_in_their_order(self, llm):
        prompts = [PROMPT, [5], "a", list(range(100, 180)), "hen " * 20]

        outputs = llm.generate(prompts, GREEDY)

        alone = [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
        assert [output.num_prompt_tokens for output in outputs] == [output.num_prompt_tokens for output in alone]
        assert [output.samples for output in outputs] == [output.samples for output in alone]

    def test_a_list_of_one_prompt_gives_a_list_of_one_output(self, llm):
        assert len(llm.generate([PROMPT], GREEDY)) == 1
        assert len(llm.generate([[5, 6]], GREEDY)) == 1

    def test_no_prompts_give_no_outputs(self, llm):
        assert llm.generate([], GREEDY) == []

    def test_defaults_are_sampling_with_silu_and_a_seed_that_is_reported(self, llm):
        first = llm.generate([5, 6, 7], SamplingParams(max_tokens=8))[0]

        again = llm.generate([5, 6, 7], SamplingParams(max_tokens=8, seed=first.seed), first.activation)[0]

        assert first.activation == Activation()
        assert again.samples == first.samples

    def test_chat_applies_the_template(self, llm):
        messages = [{"role": "user", "content": "the tree"}]

        output = llm.chat(messages, GREEDY)

        assert output.num_prompt_tokens == len(llm.tokenizer.encode_chat(messages))
        assert output.samples == llm.generate(llm.tokenizer.encode_chat(messages), GREEDY)[0].samples

    def test_chat_refuses_no_messages(self, llm):
        with pytest.raises(InvalidRequest) as caught:
            llm.chat([], GREEDY)
        assert caught.value.field == "messages"


class TestSamples:
    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=mode_id)
    def test_n_samples_come_sorted_and_each_has_its_own_stream(self, llm, activation):
        output = llm.generate(PROMPT, params(n=6), activation)[0]

        assert [sample.index for sample in output.samples] == list(range(6))
        assert len({tuple(sample.token_ids) for sample in output.samples}) == 6

    def test_greedy_samples_differ_in_stochastic_mode_only(self, llm):
        greedy = params(temperature=0.0, n=4, max_tokens=30)

        def distinct(activation: Activation) -> int:
            return len({tuple(s.token_ids) for s in llm.generate(PROMPT, greedy, activation)[0].samples})

        assert distinct(Activation()) == distinct(Activation("relu")) == 1
        assert distinct(Activation("stochastic", p=0.5, seed=3)) > 1

    def test_the_first_sample_does_not_depend_on_n(self, llm):
        one, four = (llm.generate(PROMPT, params(n=n))[0].samples[0] for n in (1, 4))
        assert one == four


class TestStream:
    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=mode_id)
    def test_the_pieces_of_a_stream_are_the_output_of_generate(self, llm, activation):
        sampling = params(n=3, logprobs=2, max_tokens=20)

        whole = joined(llm.stream(PROMPT, sampling, activation))

        expected = llm.generate(PROMPT, sampling, activation)[0]
        assert whole.samples == expected.samples
        assert whole.finished

    def test_each_token_comes_as_soon_as_it_is_there(self, llm):
        pieces = list(llm.stream(PROMPT, GREEDY))

        assert [len(piece.samples[0].token_ids) for piece in pieces] == [1] * 12
        assert [piece.finished for piece in pieces] == [False] * 11 + [True]

    def test_leaving_early_frees_everything(self, llm):
        before = llm.stats().aborted
        for piece in llm.stream(PROMPT, params(n=4, max_tokens=200)):
            assert not piece.finished
            assert llm.stats().kv_blocks_used > 0
            break

        assert_idle(llm)
        assert llm.stats().aborted == before + 1

    def test_a_stream_that_is_never_read_costs_nothing(self, llm):
        stream = llm.stream(PROMPT, GREEDY)
        assert_idle(llm)
        del stream
        assert_idle(llm)

    def test_a_refused_stream_is_refused_at_once(self, llm):
        with pytest.raises(InvalidRequest):
            llm.stream([VOCABULARY], GREEDY)

    def test_streams_can_be_read_in_turns(self, llm):
        expected = [llm.generate(prompt, GREEDY)[0].samples for prompt in (PROMPT, "a")]

        first, second = llm.stream(PROMPT, GREEDY), llm.stream("a", GREEDY)
        pieces = list(zip(first, second, strict=True))

        assert joined(iter([one for one, _ in pieces])).samples == expected[0]
        assert joined(iter([two for _, two in pieces])).samples == expected[1]

    def test_other_requests_can_run_while_a_stream_is_open(self, llm):
        expected = llm.generate(PROMPT, GREEDY)[0].samples

        stream = llm.stream(PROMPT, GREEDY)
        first = next(stream)
        llm.generate("a", params(max_tokens=30))  # finishes the stream's request, too

        for piece in stream:
            first.extend(piece)
        assert first.samples == expected


class TestStopping:
    @pytest.fixture
    def text(self, llm) -> str:
        return llm.generate(PROMPT, params(max_tokens=40))[0].samples[0].text

    def test_max_tokens(self, llm):
        sample = llm.generate(PROMPT, params(max_tokens=3))[0].samples[0]
        assert len(sample.token_ids) == 3
        assert (sample.finish_reason, sample.stop_reason) == (FinishReason.LENGTH, None)

    def test_a_stop_string_ends_the_text_before_it(self, llm, text):
        stop = text[10:13]

        sample = llm.generate(PROMPT, params(max_tokens=40, stop=(stop,)))[0].samples[0]

        assert sample.text == text[: text.index(stop)]
        assert (sample.finish_reason, sample.stop_reason) == (FinishReason.STOP, stop)

    def test_a_stop_string_that_never_comes_holds_nothing_back(self, llm, text):
        sample = llm.generate(PROMPT, params(max_tokens=40, stop=(text[-2:] + "never",)))[0].samples[0]
        assert sample.text == text
        assert sample.finish_reason is FinishReason.LENGTH

    def test_a_stop_token_ends_the_text(self, llm):
        tokens = llm.generate(PROMPT, params())[0].samples[0].token_ids
        stop = tokens[5]

        sample = llm.generate(PROMPT, params(stop_token_ids=(stop,)))[0].samples[0]

        assert sample.token_ids == tokens[: tokens.index(stop) + 1]
        assert (sample.finish_reason, sample.stop_reason) == (FinishReason.STOP, stop)

    def test_the_end_of_sequence_token_ends_the_text_and_gives_none_itself(self, llm):
        forced = params(logit_bias={EOS_TOKEN_ID: 100.0}, ignore_eos=False)

        sample = llm.generate(PROMPT, forced)[0].samples[0]

        assert (sample.token_ids, sample.text) == ([EOS_TOKEN_ID], "")
        assert (sample.finish_reason, sample.stop_reason) == (FinishReason.STOP, None)

    def test_ignore_eos_goes_on(self, llm):
        forced = params(logit_bias={EOS_TOKEN_ID: 100.0}, ignore_eos=True, max_tokens=5)

        sample = llm.generate(PROMPT, forced)[0].samples[0]

        assert sample.token_ids == [EOS_TOKEN_ID] * 5
        assert sample.finish_reason is FinishReason.LENGTH

    def test_min_tokens_keeps_the_end_of_sequence_away(self, llm):
        forced = params(logit_bias={EOS_TOKEN_ID: 100.0}, ignore_eos=False, min_tokens=4)

        sample = llm.generate(PROMPT, forced)[0].samples[0]

        assert EOS_TOKEN_ID not in sample.token_ids[:4]
        assert sample.token_ids[4:] == [EOS_TOKEN_ID]

    def test_min_tokens_keeps_stop_tokens_away(self, llm):
        forced = params(logit_bias={9: 100.0}, stop_token_ids=(9,), min_tokens=4)

        sample = llm.generate(PROMPT, forced)[0].samples[0]

        assert 9 not in sample.token_ids[:4]
        assert sample.token_ids[4:] == [9]

    def test_a_full_context_ends_the_text(self, llm):
        prompt = [7] * 200

        sample = llm.generate(prompt, params(max_tokens=None))[0].samples[0]

        assert len(sample.token_ids) == CONTEXT - 200
        assert sample.finish_reason is FinishReason.LENGTH

    def test_samples_end_each_at_its_own_token(self, llm):
        output = llm.generate(PROMPT, params(n=8, stop_token_ids=tuple(range(3, 40)), max_tokens=60))[0]

        lengths = {len(sample.token_ids) for sample in output.samples}
        assert len(lengths) > 1
        assert output.finished
        assert all(sample.finish_reason is not None for sample in output.samples)


class TestSparsity:
    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=mode_id)
    def test_it_is_the_share_of_zeros_in_the_rows_that_gave_the_tokens(self, llm, activation):
        """With a prompt of one token every row gives one, so counters of all rows must say the same."""
        before = llm.stats()

        sample = llm.generate([7], params(max_tokens=9), activation)[0].samples[0]

        after = llm.stats()
        zeros, elements = total(after.ffn_zeros) - total(before.ffn_zeros), total(after.ffn_elements)
        assert sample.sparsity == zeros / (elements - total(before.ffn_elements))
        assert (sample.sparsity > 0.1) == (activation.mode != "silu")

    def test_samples_of_a_request_have_their_own(self, llm):
        samples = llm.generate(PROMPT, params(n=3), Activation("stochastic", p=0.5))[0].samples

        assert len({sample.sparsity for sample in samples}) == 3

    def test_only_the_last_piece_of_a_stream_has_it(self, llm):
        relu = Activation("relu")

        pieces = [piece.samples[0] for piece in llm.stream(PROMPT, GREEDY, relu)]

        assert [piece.sparsity for piece in pieces[:-1]] == [None] * 11
        assert pieces[-1].sparsity == llm.generate(PROMPT, GREEDY, relu)[0].samples[0].sparsity


class TestLogits:
    def test_logit_bias_forces_a_token(self, llm):
        sample = llm.generate(PROMPT, params(logit_bias={IM_END_TOKEN_ID: 100.0}))[0].samples[0]
        assert sample.token_ids == [IM_END_TOKEN_ID] * 12

    def test_logit_bias_forbids_a_token(self, llm):
        token = llm.generate(PROMPT, GREEDY)[0].samples[0].token_ids[0]
        forbidding = SamplingParams(temperature=0.0, max_tokens=1, logit_bias={token: -100.0})
        assert llm.generate(PROMPT, forbidding)[0].samples[0].token_ids != [token]

    def test_logprobs_name_the_chosen_token_and_its_best_alternatives(self, llm):
        sample = llm.generate(PROMPT, params(logprobs=3))[0].samples[0]

        assert [position.chosen.token_id for position in sample.logprobs] == sample.token_ids
        for position in sample.logprobs:
            values = [entry.logprob for entry in position.top]
            assert len(values) == 3
            assert values == sorted(values, reverse=True)
            assert position.chosen.logprob <= values[0] < 0
            assert position.chosen.token == llm.tokenizer.token_text(position.chosen.token_id)

    def test_logprobs_are_the_models_own_before_any_bias(self, llm):
        position = (
            llm.generate(PROMPT, params(logit_bias={5: 100.0}, logprobs=0, max_tokens=1))[0].samples[0].logprobs[0]
        )
        assert position.top == ()
        assert position.chosen.token_id == 5
        assert position.chosen.logprob < -0.5

    def test_without_logprobs_there_are_none(self, llm):
        assert llm.generate(PROMPT, params())[0].samples[0].logprobs is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompt", "sampling", "error", "field"),
        [
            ([VOCABULARY], {}, InvalidRequest, "prompt"),
            ([-1], {}, InvalidRequest, "prompt"),
            ([[]], {}, InvalidRequest, "prompt"),
            ("", {}, InvalidRequest, "prompt"),
            ("\ud800", {}, InvalidRequest, "prompt"),
            ([7] * CONTEXT, {"max_tokens": None}, ContextLengthExceeded, "prompt"),
            ([7] * 250, {"max_tokens": 7}, ContextLengthExceeded, "max_tokens"),
            ("a", {"logit_bias": {VOCABULARY: 1.0}}, InvalidRequest, "logit_bias"),
            ("a", {"stop_token_ids": (VOCABULARY,)}, InvalidRequest, "stop_token_ids"),
        ],
    )
    def test_a_refused_request_leaves_nothing_behind(self, llm, prompt, sampling, error, field):
        steps = llm.stats().steps

        with pytest.raises(error) as caught:
            llm.generate(prompt, params(**sampling))

        assert caught.value.field == field
        assert_idle(llm)
        assert llm.stats().steps == steps

    def test_one_bad_prompt_refuses_all_of_them(self, llm):
        before = llm.stats().prompt_tokens

        with pytest.raises(InvalidRequest):
            llm.generate(["the", [VOCABULARY]], GREEDY)

        assert llm.stats().prompt_tokens == before

    @pytest.mark.parametrize(
        ("activation", "field"),
        [(Activation("relu"), "activation.mode"), (Activation("stochastic", p=0.5), "activation.p")],
    )
    def test_an_untuned_activation_is_refused_unless_allowed(self, model, llm, activation, field):
        with LLM(str(model), config=config(allow_untuned_activations=False)) as strict:
            with pytest.raises(UntunedActivation, match="allow-untuned") as caught:
                strict.generate(PROMPT, GREEDY, activation)
            assert caught.value.field == field
        assert llm.generate(PROMPT, GREEDY, activation)[0].finished


class TestCache:
    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=mode_id)
    def test_a_repeated_prompt_is_found_and_changes_nothing(self, model, activation):
        prompt = list(range(50, 90))
        with LLM(str(model), config=config()) as llm:
            first, second = (llm.generate(prompt, params(), activation)[0] for _ in range(2))

            assert first.samples == second.samples
            assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
            assert llm.stats().cached_prompt_tokens == 32

    @pytest.mark.parametrize("seed", range(4))  # with some of them the first sample is not the last to end
    def test_what_samples_share_with_the_first_does_not_count_as_cached(self, model, seed):
        ending = params(n=6, seed=seed, stop_token_ids=tuple(range(3, 40)), max_tokens=60)
        with LLM(str(model), config=config()) as llm:
            assert llm.generate([7] * 40, ending)[0].num_cached_tokens == 0

    def test_switched_off_nothing_is_cached(self, model):
        with LLM(str(model), config=config(prefix_caching=False)) as llm:
            outputs = [llm.generate([7] * 40, params())[0] for _ in range(2)]

            assert [output.num_cached_tokens for output in outputs] == [0, 0]
            assert llm.stats().kv_blocks_cached == 0

    @pytest.mark.parametrize("activation", ACTIVATIONS, ids=mode_id)
    def test_a_crowded_cache_preempts_and_changes_nothing(self, model, llm, activation):
        prompts = [[token] * 20 for token in range(10, 18)]
        sampling = params(max_tokens=60)
        block_bytes = 2 * 3 * 2 * 16 * BLOCK_SIZE * 4  # keys and values, layers, heads, head_dim, tokens, float32
        one_mib = 2**20 // block_bytes
        settings = config(kv_cache_mib=1, max_num_seqs=64)
        with LLM(str(model), config=settings) as crowded:
            assert crowded.info.num_kv_blocks == one_mib
            outputs = crowded.generate(prompts * 4, sampling, activation)

            assert crowded.stats().preemptions > 0
            assert_idle(crowded)
        expected = llm.generate(prompts, sampling, activation)
        assert [output.samples for output in outputs] == [output.samples for output in expected] * 4


class TestLife:
    def test_a_closed_model_refuses_work(self, model):
        llm = LLM(str(model), config=config())
        llm.close()
        llm.close()

        for use in (lambda: llm.generate("a", GREEDY), lambda: llm.stream("a", GREEDY), llm.stats):
            with pytest.raises(EngineStopped, match="closed"):
                use()

    def test_an_open_stream_ends_when_the_model_is_closed(self, model):
        llm = LLM(str(model), config=config())
        stream = llm.stream(PROMPT, GREEDY)
        next(stream)

        llm.close()

        with pytest.raises(EngineStopped):
            list(stream)

    def test_leaving_the_block_closes(self, model):
        with LLM(str(model), config=config()) as llm:
            pass
        with pytest.raises(EngineStopped):
            llm.stats()

    def test_progress_is_reported(self, model):
        lines: list[str] = []
        LLM(str(model), config=config(), progress=lines.append).close()
        assert any(line.startswith("Loading") for line in lines)

    def test_the_model_may_be_named_in_the_configuration(self, model):
        with LLM(config=config(model=str(model))) as llm:
            assert llm.info.name == model.name
            assert llm.info.max_model_len == CONTEXT


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_num_seqs": 0}, "max_num_seqs must be at least 1, got 0"),
            ({"max_num_batched_tokens": 0}, "max_num_batched_tokens must be at least 1, got 0"),
            ({"max_waiting": 0}, "max_waiting must be at least 1, got 0"),
            ({"kv_cache_mib": 0}, "kv_cache_mib must be at least 1, got 0"),
            ({"max_model_len": 0}, "max_model_len must be at least 1, got 0"),
            ({"threads": -1}, "threads must be at least 1, got -1"),
            ({"max_num_seqs": 65, "max_num_batched_tokens": 64}, r"max_num_batched_tokens \(64\) must be at least"),
            ({"max_model_len": CONTEXT + 1}, "max_model_len 257 exceeds the model's context of 256 tokens"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_what_cannot_work_is_refused(self, model, settings, message):
        with pytest.raises(InvalidConfig, match=message):
            LLM(str(model), config=config(**settings))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"dtype": "float16"}, "dtype must be one of 'auto', 'float32', 'bfloat16', got 'float16'"),
            ({"ffn_path": "fast"}, "ffn_path must be one of 'auto', 'sparse', 'dense', got 'fast'"),
            ({"quantize": "int2"}, "quantize must be one of 'none', 'int8', 'int4', got 'int2'"),
            ({"device": "tpu"}, "device must be one of 'auto', 'cpu', 'cuda', got 'tpu'"),
            ({"kernels": None}, "kernels must be one of 'auto', 'vector', 'reference', 'triton', got None"),
        ],
    )
    def test_an_unknown_choice_is_refused(self, settings, message):
        with pytest.raises(InvalidConfig, match=message):
            EngineConfig(**settings)

    def test_choices_may_be_plain_strings(self):
        settings = EngineConfig(dtype="bfloat16", ffn_path="sparse", kernels="reference")
        assert settings.dtype is DType.BFLOAT16
        assert settings.ffn_path is FfnPath.SPARSE
        assert settings.kernels is KernelSet.REFERENCE

    def test_a_cache_that_cannot_hold_the_wanted_context_is_refused(self, tmp_path):
        make_tiny("llama", tmp_path, max_position_embeddings=2048)
        with pytest.raises(InvalidConfig, match="kv_cache_mib 1 holds 1360 tokens, less than one sequence of 2048"):
            LLM(str(tmp_path), config=config(kv_cache_mib=1, max_model_len=2048))

    def test_without_a_wanted_context_the_cache_limits_it(self, tmp_path):
        make_tiny("llama", tmp_path, max_position_embeddings=2048)
        with LLM(str(tmp_path), config=config(kv_cache_mib=1)) as llm:
            assert llm.info.max_model_len == 1360

    def test_a_shorter_context_than_the_models_limits_requests(self, model):
        with LLM(str(model), config=config(max_model_len=20)) as llm:
            sample = llm.generate([7] * 15, params(max_tokens=None))[0].samples[0]
            assert len(sample.token_ids) == 5
            with pytest.raises(ContextLengthExceeded, match="20 tokens"):
                llm.generate([7] * 20, params(max_tokens=None))
