"""The whole engine on Triton's kernels: the reference's tokens, and the same bits whatever else it is doing."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import LLM, Activation, EngineConfig, SamplingParams
from engine.outputs import SampleOutput
from tests.engine.kernels.triton.devices import DEVICE
from tests.engine.models.tiny import make_tiny

ACTIVATIONS = [Activation(), Activation("stochastic", p=0.6, seed=11), Activation("relu")]
# Two blocks of the cache each, and a third one for the last tokens.
PROMPTS = [[(7 * i + 3 * j) % 250 + 1 for j in range(29 + i)] for i in range(3)]
SAMPLING = SamplingParams(temperature=0.9, seed=5, max_tokens=4, ignore_eos=True, logprobs=1)
GREEDY = replace(SAMPLING, temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny("qwen3", folder, num_hidden_layers=2)
    return folder


def start(model: Path, **options: object) -> LLM:
    config = EngineConfig(
        model=str(model),
        dtype="float32",
        device=DEVICE.type,
        kernels="triton",
        kv_cache_mib=8,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        allow_untuned_activations=True,
    )
    return LLM(config=replace(config, **options))


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with start(model, ffn_path="dense") as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[SampleOutput]:
    """One solo run for each activation: the truth for all tests here."""
    return [solo(llm, number) for number in range(3)]


def solo(llm: LLM, number: int, sampling: SamplingParams = SAMPLING) -> SampleOutput:
    return llm.generate(PROMPTS[number], sampling, ACTIVATIONS[number])[0].samples[0]


def in_batch(llm: LLM, tokens_of_the_other: int = 4) -> list[SampleOutput]:
    """The same requests as `alone`, behind another one, all at once."""
    engine = llm._engine
    assert engine is not None
    other = replace(SAMPLING, seed=9, max_tokens=tokens_of_the_other)
    requests = [engine.check("other", PROMPTS[1][::-1], other, ACTIVATIONS[2])]
    requests += [engine.check(f"mine-{number}", PROMPTS[number], SAMPLING, ACTIVATIONS[number]) for number in range(3)]
    for request in requests:
        engine.add(request)
    samples: dict[str, SampleOutput] = {}
    while engine.has_work:
        for output in engine.step():
            for piece in output.samples:
                if output.request_id in samples:
                    samples[output.request_id].extend(piece)
                else:
                    samples[output.request_id] = piece
    return [samples[f"mine-{number}"] for number in range(3)]


def test_tokens_are_those_of_the_reference_kernels(model: Path, llm: LLM, alone: list[SampleOutput]) -> None:
    with start(model, kernels="reference", device="cpu") as plain:
        expected = [solo(plain, number) for number in range(3)]
        greedy = [solo(plain, number, GREEDY).token_ids for number in (1, 2)]

    assert [sample.token_ids for sample in alone] == [sample.token_ids for sample in expected]
    assert [solo(llm, number, GREEDY).token_ids for number in (1, 2)] == greedy
    for ours, theirs in zip(alone, expected, strict=True):
        for found, wanted in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
            assert found.chosen.logprob == pytest.approx(wanted.chosen.logprob, abs=1e-4)


def test_in_a_batch_with_cached_prompts(llm: LLM, alone: list[SampleOutput]) -> None:
    before = llm.stats().prefix_cache_hits

    batched = in_batch(llm)

    assert llm.stats().prefix_cache_hits > before
    assert batched == alone


def test_in_small_chunks_with_preemption_and_skipped_zeros(model: Path, alone: list[SampleOutput]) -> None:
    with start(model, max_num_batched_tokens=21, ffn_path="sparse") as small:
        assert small._engine is not None
        pool = small._engine._pool
        pool.allocate(pool.num_free - 5)  # as if someone else held all other blocks
        batched = in_batch(small, tokens_of_the_other=14)

        assert small.stats().preemptions > 0
        assert small.stats().ffn_rows["sparse"] > 0
    assert batched == alone


def test_what_the_engine_says_of_itself(llm: LLM) -> None:
    assert llm.info.kernels["attention"] == "Triton, paged"
    assert llm.info.device == ("cpu" if DEVICE.type == "cpu" else llm.info.device)
    assert llm.stats().ffn_zeros[ACTIVATIONS[2].mode][0] > 0


def test_prompts_are_scored_as_the_reference_does(model: Path, llm: LLM) -> None:
    with start(model, kernels="reference", device="cpu") as plain:
        (expected,) = plain.score(PROMPTS[0])

    (found,) = llm.score(PROMPTS[0])

    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU: the interpreter would need hours")
def test_greedy_tokens_of_the_default_model_equal_those_of_the_cpu() -> None:
    prompts, sampling = ["The capital of France is", "Once upon a time"], SamplingParams(temperature=0, max_tokens=64)
    answers = []
    for device in ("cpu", "cuda"):
        with LLM(config=EngineConfig(device=device, dtype="float32", kv_cache_mib=256)) as llm:
            outputs = [llm.generate(prompts, sampling, activation) for activation in ACTIVATIONS]
            answers.append([output.samples[0].token_ids for some in outputs for output in some])

    assert answers[0] == answers[1]
