"""Same request, same seed: the same output to the last bit of a log-probability, whatever else the engine is doing."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from engine import LLM, Activation, ActivationMode, DType, EngineConfig, FfnPath, SamplingParams, Scope
from engine.outputs import SampleOutput
from tests.engine.models.tiny import make_tiny

STOCHASTIC = Activation(ActivationMode.STOCHASTIC, p=0.75, seed=11)
ACTIVATIONS = [
    Activation(),
    STOCHASTIC,
    replace(STOCHASTIC, scope=Scope.DECODE),
    Activation(ActivationMode.RELU),
    Activation(ActivationMode.RELU, scope=Scope.DECODE),
]
SAMPLING = SamplingParams(temperature=0.9, top_p=0.95, seed=5, max_tokens=24, ignore_eos=True, logprobs=2)


@dataclass(frozen=True)
class Subject:
    """A model to try, prompts for it, and a cache too small for 16 requests at once."""

    model: str | None
    prompts: list[list[int]]
    small_cache_mib: int
    tokens_of_others: int

    def start(self, dtype: DType = DType.FLOAT32, **options: object) -> LLM:
        config = EngineConfig(model=self.model, dtype=dtype, kv_cache_mib=256, allow_untuned_activations=True)
        return LLM(config=replace(config, **options))


def tiny_subject(folder: Path) -> Subject:
    make_tiny("llama", folder)
    prompts = [[(7 * i + 3 * j) % 250 + 1 for j in range(20 + 3 * i)] for i in range(16)]
    return Subject(str(folder), prompts, small_cache_mib=1, tokens_of_others=110)


def default_subject() -> Subject:
    prompts = [[(31 * i + 17 * j * j) % 40_000 + 100 for j in range(20 + 3 * i)] for i in range(16)]
    return Subject(None, prompts, small_cache_mib=16, tokens_of_others=24)


# The default model as it is served; in float32 it would take minutes, and show what the tiny one shows.
@pytest.fixture(
    scope="module",
    params=[
        ("tiny", DType.FLOAT32),
        ("tiny", DType.BFLOAT16),
        pytest.param(("default", DType.BFLOAT16), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def setting(request: pytest.FixtureRequest) -> tuple[str, DType]:
    model, dtype = request.param
    return model, dtype


@pytest.fixture(scope="module")
def subject(setting: tuple[str, DType], tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return tiny_subject(tmp_path_factory.mktemp("tiny")) if setting[0] == "tiny" else default_subject()


@pytest.fixture(scope="module")
def dtype(setting: tuple[str, DType]) -> DType:
    return setting[1]


@pytest.fixture(scope="module")
def llm(subject: Subject, dtype: DType) -> Iterator[LLM]:
    with subject.start(dtype) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm: LLM, subject: Subject) -> list[SampleOutput]:
    """One solo run for each activation: the truth for all tests here."""
    return [solo(llm, subject.prompts[i], activation) for i, activation in enumerate(ACTIVATIONS)]


def solo(llm: LLM, prompt: list[int], activation: Activation) -> SampleOutput:
    return llm.generate(prompt, SAMPLING, activation)[0].samples[0]


def in_batch(llm: LLM, subject: Subject) -> list[SampleOutput]:
    """The same requests as `alone` among 11 others of all modes, two samples each, all at once."""
    engine = llm._engine
    assert engine is not None
    requests = []
    for i, prompt in enumerate(subject.prompts):
        mine = i < len(ACTIVATIONS)
        activation = ACTIVATIONS[i % len(ACTIVATIONS)]
        sampling = (
            SAMPLING
            if mine
            else replace(SAMPLING, seed=100 + i, temperature=1.1, n=2, max_tokens=subject.tokens_of_others)
        )
        requests.append(engine.check(f"batch-{i}", prompt, sampling, activation))
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
    return [samples[f"batch-{i}"] for i in range(len(ACTIVATIONS))]


def test_alone_twice(llm: LLM, subject: Subject, alone: list[SampleOutput]) -> None:
    again = [solo(llm, subject.prompts[i], activation) for i, activation in enumerate(ACTIVATIONS)]

    assert again == alone


def test_in_a_batch_of_16_mixed_requests(llm: LLM, subject: Subject, alone: list[SampleOutput]) -> None:
    assert in_batch(llm, subject) == alone


def test_after_forced_preemption(subject: Subject, dtype: DType, alone: list[SampleOutput]) -> None:
    with subject.start(dtype, kv_cache_mib=subject.small_cache_mib) as llm:
        batched = in_batch(llm, subject)

        assert llm.stats().preemptions > 0
    assert batched == alone


def test_without_prefix_caching(subject: Subject, dtype: DType, alone: list[SampleOutput]) -> None:
    with subject.start(dtype, prefix_caching=False) as llm:
        batched = in_batch(llm, subject)

        assert llm.stats().prefix_cache_hits == 0
    assert batched == alone


def test_with_the_whole_prompt_in_the_prefix_cache(llm: LLM, subject: Subject, alone: list[SampleOutput]) -> None:
    before = llm.stats().prefix_cache_hits

    batched = in_batch(llm, subject)

    assert llm.stats().prefix_cache_hits > before
    assert batched == alone


def test_with_prompts_in_small_chunks(subject: Subject, dtype: DType, alone: list[SampleOutput]) -> None:
    with subject.start(dtype, max_num_batched_tokens=17, max_num_seqs=16) as llm:
        assert in_batch(llm, subject) == alone


@pytest.mark.parametrize("threads", [1, 2])
def test_on_any_number_of_threads(subject: Subject, dtype: DType, alone: list[SampleOutput], threads: int) -> None:
    with subject.start(dtype, threads=threads) as llm:
        if llm.info.threads != threads:
            pytest.skip(f"needs {threads} threads")
        assert in_batch(llm, subject) == alone


@pytest.mark.parametrize("activation", [ACTIVATIONS[0], ACTIVATIONS[3]], ids=["silu", "relu"])
def test_a_continued_conversation_reuses_generated_tokens(llm: LLM, subject: Subject, activation: Activation) -> None:
    """Keys and values of generated tokens equal those of the same tokens in a prompt, bit for bit."""
    prompt = subject.prompts[0]
    first = solo(llm, prompt, activation)
    longer = prompt + first.token_ids + [5, 6, 7]
    cached = llm.generate(longer, SAMPLING, activation)[0]
    with subject.start(DType(llm.info.dtype), prefix_caching=False) as fresh:
        uncached = fresh.generate(longer, SAMPLING, activation)[0]

    assert cached.num_cached_tokens >= len(prompt) + len(first.token_ids) - 16
    assert cached.samples == uncached.samples


def test_reported_seeds_reproduce_an_unseeded_request(llm: LLM, subject: Subject) -> None:
    unseeded = replace(SAMPLING, seed=None)
    first = llm.generate(subject.prompts[2], unseeded, Activation("stochastic", p=0.8))[0]

    again = llm.generate(subject.prompts[2], replace(unseeded, seed=first.seed), first.activation)[0]

    assert again.samples == first.samples


def test_samples_of_a_request_differ_and_are_reproducible(llm: LLM, subject: Subject) -> None:
    """Greedy: all diversity comes from the activation."""
    greedy = replace(SAMPLING, temperature=0, n=4)
    first = llm.generate(subject.prompts[3], greedy, STOCHASTIC)[0]

    again = llm.generate(subject.prompts[3], greedy, STOCHASTIC)[0]

    assert again.samples == first.samples
    assert len({tuple(sample.token_ids) for sample in first.samples}) > 1


@pytest.mark.parametrize("path", [FfnPath.SPARSE, FfnPath.DENSE])
def test_whether_zeros_are_skipped_or_not(
    subject: Subject, dtype: DType, alone: list[SampleOutput], path: FfnPath
) -> None:
    with subject.start(dtype, ffn_path=path) as llm:
        assert in_batch(llm, subject) == alone
        assert llm.stats().ffn_rows[path] > 0
