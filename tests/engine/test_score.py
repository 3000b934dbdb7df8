"""`LLM.score`: log-probabilities of prompts through the engine's own scheduler, kernels and cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine import (
    LLM,
    Activation,
    ActivationMode,
    ContextLengthExceeded,
    DType,
    EngineConfig,
    FfnPath,
    InvalidRequest,
    KernelSet,
    PromptScore,
    SamplingParams,
    UntunedActivation,
)
from engine.activation import PositiveBranch, apply_activation
from tests.engine.models.tiny import VOCAB_SIZE, make_tiny
from tests.engine.steps import activation_rows

CONTEXT = 256
SILU, RELU = Activation(), Activation("relu")
STOCHASTIC = Activation("stochastic", p=0.6, seed=9)
ACTIVATIONS = [SILU, STOCHASTIC, RELU]
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=[*ActivationMode])
GENERATION = SamplingParams(temperature=0.9, seed=5, max_tokens=24, ignore_eos=True, logprobs=1)


def tokens(length: int, seed: int = 0) -> list[int]:
    drawn: list[int] = torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return drawn


@dataclass(frozen=True)
class Subject:
    """A tiny model, ours by its folder and transformers'."""

    folder: str
    model: PreTrainedModel

    def start(self, **overrides: Any) -> LLM:
        settings = {"dtype": DType.FLOAT32, "kv_cache_mib": 8, "threads": 1, "allow_untuned_activations": True}
        return LLM(config=EngineConfig(model=self.folder, **(settings | overrides)))

    @torch.inference_mode()
    def expected(self, prompt: Sequence[int], activation: Activation = SILU) -> Tensor:
        """float64 [tokens - 1]: plain PyTorch, the activation by its definition."""
        for index, layer in enumerate(self.model.model.layers):
            layer.mlp.act_fn = DefinedActivation(index, activation, len(prompt))
        logits = self.model(torch.tensor([prompt])).logits[0].double()
        return logits.log_softmax(-1)[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]


class DefinedActivation(nn.Module):
    def __init__(self, layer: int, activation: Activation, count: int) -> None:
        super().__init__()
        self.layer = layer
        self.rows = activation_rows([activation] * count, range(count), PositiveBranch.SILU)

    def forward(self, gate: Tensor) -> Tensor:
        return apply_activation(gate[0], self.rows, self.layer)[None]


def load(family: str, folder: pytest.TempPathFactory) -> Subject:
    path = folder.mktemp(family)
    return Subject(str(path), make_tiny(family, path))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load("llama", tmp_path_factory)


@pytest.fixture(scope="module")
def shared_llm(subject: Subject) -> Iterator[LLM]:
    with subject.start() as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """A model for all tests; each must leave it idle."""
    yield shared_llm
    stats = shared_llm.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


def score(llm: LLM, prompt: Sequence[int], activation: Activation = SILU) -> PromptScore:
    return llm.score(prompt, activation)[0]


def assert_close(found: PromptScore, expected: Tensor) -> None:
    assert expected.std() > 0.1  # else any small numbers would do
    np.testing.assert_allclose(found.logprobs, expected.numpy(), rtol=0, atol=1e-4)


class TestValues:
    @pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-swa", "smollm2-tied"])
    def test_equal_transformers(self, family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
        subject, prompt = load(family, tmp_path_factory), tokens(60)
        with subject.start() as llm:
            assert_close(score(llm, prompt), subject.expected(prompt))

    @pytest.mark.parametrize("kernels", KernelSet)
    @every_activation
    def test_equal_the_definition_of_the_activation(
        self, subject: Subject, activation: Activation, kernels: KernelSet
    ) -> None:
        prompt = tokens(60)
        expected = subject.expected(prompt, activation)
        with subject.start(kernels=kernels) as llm:
            assert_close(score(llm, prompt, activation), expected)
        if activation is not SILU:
            assert (expected - subject.expected(prompt)).abs().max() > 0.1

    def test_equal_those_of_the_same_tokens_when_they_are_generated(self, llm: LLM) -> None:
        prompt = tokens(20)
        generated = llm.generate(prompt, GENERATION, STOCHASTIC)[0].samples[0]

        scored = score(llm, prompt + generated.token_ids, STOCHASTIC)

        assert generated.logprobs is not None
        assert list(scored.logprobs[len(prompt) - 1 :]) == [each.chosen.logprob for each in generated.logprobs]

    def test_one_fewer_than_tokens(self, llm: LLM) -> None:
        scores = llm.score([tokens(20), [7]])

        assert [len(each.logprobs) for each in scores] == [19, 0]
        assert scores[0].token_ids == tuple(tokens(20))

    def test_logits_that_are_not_finite_are_not_hidden(self, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
        with subject.start() as llm:
            expected = score(llm, tokens(20)).logprobs
            head = llm._engine._runner.backend.weights.lm_head  # type: ignore[union-attr]
            token = int(np.argmin(expected))
            head[300] = torch.nan

            assert token != 300
            assert all(np.isnan(score(llm, tokens(20)).logprobs))


class TestSameBits:
    @every_activation
    def test_in_chunks_of_any_size(self, subject: Subject, llm: LLM, activation: Activation) -> None:
        prompt = tokens(150)
        expected = score(llm, prompt, activation)
        for chunk in (1, 17, 64):
            with subject.start(max_num_batched_tokens=chunk, max_num_seqs=1) as chunked:
                assert score(chunked, prompt, activation) == expected

    def test_in_parts_of_the_logits(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = score(llm, tokens(150))

        monkeypatch.setattr("engine.runner.SCORE_ROWS", 7)

        assert score(llm, tokens(150)) == expected

    @pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16])
    def test_in_a_batch_of_all_modes(self, subject: Subject, dtype: DType) -> None:
        prompts = [tokens(20 + 11 * i, i) for i in range(9)]
        each = [ACTIVATIONS[i % 3] for i in range(9)]
        with subject.start(dtype=dtype) as llm:
            together = llm.score(prompts, each)
            assert together == [score(llm, *pair) for pair in zip(prompts, each, strict=True)]

    def test_in_a_step_that_skips_zeros_of_some_rows(self, subject: Subject) -> None:
        prompts = [tokens(20, 1), tokens(30, 2)]
        with subject.start(ffn_path=FfnPath.SPARSE) as llm:
            together = llm.score(prompts, [SILU, RELU])

            assert llm.stats().ffn_rows["sparse"] == 30
            assert together == [score(llm, prompts[0], SILU), score(llm, prompts[1], RELU)]

    @pytest.mark.parametrize("activation", [STOCHASTIC, RELU], ids=["stochastic", "relu"])
    def test_after_preemption(self, subject: Subject, llm: LLM, activation: Activation) -> None:
        """Answers grow into a small cache and leave the prompt, admitted last, little of each step's budget."""
        prompt = tokens(200)
        expected = score(llm, prompt, activation)
        with subject.start(kv_cache_mib=1, max_num_batched_tokens=24, max_num_seqs=21) as crowded:
            streams = [crowded.stream(tokens(20, i), replace(GENERATION, max_tokens=150)) for i in range(20)]
            for stream in streams:
                next(stream)

            assert score(crowded, prompt, activation) == expected
            computed = crowded.stats().ffn_elements[activation.mode][0] / crowded.info.intermediate_size
            assert computed > len(prompt)  # the beginning twice

    @every_activation
    def test_whatever_the_prefix_cache_holds(self, llm: LLM, activation: Activation) -> None:
        prompt = tokens(100, 3)
        first = score(llm, prompt, activation)
        llm.generate(prompt, GENERATION, activation)
        hits = llm.stats().prefix_cache_hits

        assert score(llm, prompt, activation) == first
        assert llm.stats().prefix_cache_hits == hits


class TestOtherRequests:
    @every_activation
    def test_generation_in_the_same_steps_is_not_disturbed(self, llm: LLM, activation: Activation) -> None:
        prompt = tokens(30, 4)
        text, scores = llm.generate(prompt, GENERATION, activation)[0], score(llm, prompt, activation)

        stream = llm.stream(prompt, GENERATION, activation)
        whole = next(stream)
        assert score(llm, prompt, activation) == scores
        for piece in stream:
            whole.extend(piece)

        assert whole.samples == text.samples

    def test_a_scored_prompt_can_be_found_in_the_prefix_cache_by_others(self, subject: Subject) -> None:
        with subject.start() as llm:
            score(llm, tokens(40))
            assert llm.generate(tokens(40), GENERATION)[0].num_cached_tokens == 32
            assert llm.stats().prefix_cache_queries == 40

    def test_an_interrupted_score_leaves_nothing_behind(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*arguments: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(llm._engine._runner, "_score", interrupt)  # type: ignore[union-attr]
            with pytest.raises(KeyboardInterrupt):
                score(llm, tokens(40))

        assert len(score(llm, tokens(40)).logprobs) == 39


class TestActivations:
    def test_one_for_each_prompt(self, llm: LLM) -> None:
        seeds = [replace(STOCHASTIC, seed=seed) for seed in (1, 2)]

        one, other = llm.score([tokens(30)] * 2, seeds)

        assert [one.activation, other.activation] == seeds
        assert one.logprobs != other.logprobs

    def test_as_many_as_prompts(self, llm: LLM) -> None:
        with pytest.raises(InvalidRequest, match="one for each of the 2 prompts, got 3"):
            llm.score([[1, 2], [3, 4]], [SILU] * 3)

    def test_a_drawn_seed_is_reported_and_gives_the_same_again(self, llm: LLM) -> None:
        first = score(llm, tokens(30), Activation("stochastic", p=0.5))

        assert first.activation.seed is not None
        assert score(llm, tokens(30), first.activation) == first

    def test_untuned_ones_are_refused_unless_allowed(self, subject: Subject) -> None:
        with subject.start(allow_untuned_activations=False) as llm, pytest.raises(UntunedActivation):
            score(llm, [1, 2], RELU)


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompt", "activation", "error", "field"),
        [
            ("", SILU, InvalidRequest, "prompt"),
            ([[]], SILU, InvalidRequest, "prompt"),
            ([1, VOCAB_SIZE], SILU, InvalidRequest, "prompt"),
            ([7] * (CONTEXT + 1), SILU, ContextLengthExceeded, "prompt"),
            ([1, 2], replace(RELU, scope="decode"), InvalidRequest, "activation.scope"),
        ],
    )
    def test_name_the_field_and_compute_nothing(
        self, llm: LLM, prompt: Any, activation: Activation, error: type[InvalidRequest], field: str
    ) -> None:
        steps = llm.stats().steps
        with pytest.raises(error) as caught:
            llm.score(prompt, activation)
        assert caught.value.field == field
        assert llm.stats().steps == steps

    def test_a_prompt_may_fill_the_whole_context(self, subject: Subject, llm: LLM) -> None:
        prompt = tokens(CONTEXT)
        assert_close(score(llm, prompt), subject.expected(prompt))


def test_no_prompts_have_no_scores(llm: LLM) -> None:
    assert llm.score([]) == []


@every_activation
def test_statistics_count_the_zeros_of_scored_prompts(llm: LLM, activation: Activation) -> None:
    before = llm.stats()
    score(llm, tokens(50), activation)
    after = llm.stats()

    zeros, elements = (
        np.subtract(getattr(after, name)[activation.mode], getattr(before, name)[activation.mode])
        for name in ("ffn_zeros", "ffn_elements")
    )
    assert elements.tolist() == [50 * llm.info.intermediate_size] * llm.info.num_layers
    share = zeros / elements  # of random gates half are negative
    assert np.allclose(share, {"silu": 0.0, "stochastic": 0.2, "relu": 0.5}[activation.mode], atol=0.05)
    assert after.prompt_tokens == before.prompt_tokens + 50
    assert after.generated_tokens == before.generated_tokens
