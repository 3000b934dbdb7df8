"""The engine thread and its asyncio interface, on a tiny model."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from engine import (
    LLM,
    Activation,
    AsyncEngine,
    ContextLengthExceeded,
    EngineConfig,
    EngineOverloaded,
    EngineStopped,
    FinishReason,
    InvalidRequest,
    RequestOutput,
    RequestStream,
    SamplingParams,
    UntunedActivation,
)
from engine.request import Request
from engine.step import StepInputs
from tests.engine.models.tiny import VOCAB_SIZE, make_tiny

LONG = SamplingParams(temperature=0.8, seed=1, max_tokens=200, ignore_eos=True)
SHORT = SamplingParams(temperature=0.8, seed=1, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_tiny("llama", folder)
    return str(folder)


@pytest.fixture
def engine(model: str) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(EngineConfig(model=model, kv_cache_mib=16, max_num_seqs=8, max_waiting=8))
    engine.start()
    yield engine
    engine.shutdown()


async def collect(stream: RequestStream) -> RequestOutput:
    whole = await anext(stream)
    async for piece in stream:
        whole.extend(piece)
    return whole


async def until_idle(engine: AsyncEngine) -> None:
    """Wait for the step in which the engine notices that nothing is left."""
    while engine.stats().running or engine.stats().waiting:
        await asyncio.sleep(0.001)


async def test_generate_yields_pieces_that_make_up_the_offline_result(engine: AsyncEngine, model: str) -> None:
    pieces = [piece async for piece in engine.generate("Once upon", SHORT)]

    with LLM(model, config=EngineConfig(kv_cache_mib=16)) as llm:
        expected = llm.generate("Once upon", SHORT)[0].samples[0]
    assert "".join(sample.text for piece in pieces for sample in piece.samples) == expected.text
    assert [token for piece in pieces for sample in piece.samples for token in sample.token_ids] == expected.token_ids
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]


async def test_pieces_pile_up_into_one_for_a_slow_reader(engine: AsyncEngine) -> None:
    stream = engine.submit([1, 2, 3], SHORT)
    while engine.stats().generated_tokens < 12:
        await asyncio.sleep(0.001)

    pieces = [piece async for piece in stream]

    assert len(pieces) == 1
    assert len(pieces[0].samples[0].token_ids) == 12
    assert pieces[0].finished


async def test_many_requests_at_once_equal_their_solo_runs(engine: AsyncEngine) -> None:
    prompts = [[i + 1] * (i + 1) for i in range(8)]
    solo = [await collect(engine.submit(prompt, SHORT, request_id="r")) for prompt in prompts]

    together = await asyncio.gather(
        *(collect(engine.submit(prompt, SHORT, request_id=f"{i}")) for i, prompt in enumerate(prompts))
    )

    assert [output.samples for output in together] == [output.samples for output in solo]


async def test_abort_frees_everything(engine: AsyncEngine) -> None:
    stream = engine.submit([1, 2, 3], LONG)
    await anext(stream)

    stream.abort()
    await until_idle(engine)

    assert engine.stats().kv_blocks_used == 0
    assert engine.stats().aborted == 1
    assert engine.stats().generated_tokens < 200
    assert [piece async for piece in stream] == []


async def test_abort_before_the_engine_has_seen_the_request(engine: AsyncEngine) -> None:
    stream = engine.submit([1, 2, 3], LONG)
    stream.abort()

    other = await collect(engine.submit([4, 5], SHORT))

    await until_idle(engine)
    assert other.finished
    assert engine.stats().kv_blocks_used == 0


async def test_abort_after_the_end_changes_nothing(engine: AsyncEngine) -> None:
    stream = engine.submit([1, 2, 3], SHORT)
    await collect(stream)

    stream.abort()
    await collect(engine.submit([1], SHORT))

    assert engine.stats().aborted == 0


async def test_leaving_generate_early_aborts(engine: AsyncEngine) -> None:
    generator = engine.generate([1, 2, 3], LONG)
    await anext(generator)

    await generator.aclose()
    await until_idle(engine)

    assert engine.stats().aborted == 1
    assert engine.stats().kv_blocks_used == 0


async def test_a_cancelled_reader_aborts(engine: AsyncEngine) -> None:
    started = asyncio.Event()

    async def read() -> None:
        async for _ in engine.generate([1, 2, 3], LONG):
            started.set()

    reader = asyncio.create_task(read())
    await started.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await until_idle(engine)

    assert engine.stats().kv_blocks_used == 0


async def test_the_event_loop_runs_while_the_engine_computes(engine: AsyncEngine) -> None:
    """Between two pieces the loop must get many turns: the engine computes in its own thread."""
    stream = engine.submit(list(range(1, 50)), LONG)
    reader = asyncio.create_task(collect(stream))
    turns = 0
    while not reader.done():
        turns += 1
        await asyncio.sleep(0)

    assert turns > engine.stats().steps


async def test_a_full_queue_refuses_and_loses_nothing(engine: AsyncEngine) -> None:
    accepted: list[RequestStream] = []

    def submit_without_end() -> None:
        while True:
            accepted.append(engine.submit([1, 2, 3], LONG))

    with pytest.raises(EngineOverloaded) as refusal:
        submit_without_end()

    outputs = await asyncio.gather(*(collect(stream) for stream in accepted))

    assert refusal.value.retry_after > 0
    assert len(accepted) >= 8
    assert all(output.finished and len(output.samples[0].token_ids) == 200 for output in outputs)


@pytest.mark.parametrize(
    ("prompt", "sampling", "activation", "error", "field"),
    [
        ([], SHORT, Activation(), InvalidRequest, "prompt"),
        ([VOCAB_SIZE], SHORT, Activation(), InvalidRequest, "prompt"),
        ([-1], SHORT, Activation(), InvalidRequest, "prompt"),
        ([1] * 256, SHORT, Activation(), ContextLengthExceeded, "prompt"),
        ([1] * 250, SHORT, Activation(), ContextLengthExceeded, "max_tokens"),
        ([1], SamplingParams(logit_bias={VOCAB_SIZE: 1.0}), Activation(), InvalidRequest, "logit_bias"),
        ([1], SamplingParams(stop_token_ids=[-5]), Activation(), InvalidRequest, "stop_token_ids"),
        ([1], SHORT, Activation("relu"), UntunedActivation, "activation.mode"),
        ([1], SHORT, Activation("stochastic", p=0.5), UntunedActivation, "activation.p"),
    ],
)
async def test_refused_requests_name_the_field_and_leave_nothing(
    engine: AsyncEngine,
    prompt: list[int],
    sampling: SamplingParams,
    activation: Activation,
    error: type[InvalidRequest],
    field: str,
) -> None:
    with pytest.raises(error) as refusal:
        engine.submit(prompt, sampling, activation)

    assert refusal.value.field == field
    assert engine.stats().waiting == engine.stats().running == 0


async def test_a_request_id_is_unique_among_those_in_flight(engine: AsyncEngine) -> None:
    first = engine.submit([1, 2], SHORT, request_id="twin")

    with pytest.raises(InvalidRequest) as refusal:
        engine.submit([3, 4], SHORT, request_id="twin")

    assert refusal.value.field == "request_id"
    assert (await collect(first)).finished
    assert (await collect(engine.submit([3, 4], SHORT, request_id="twin"))).finished


async def test_a_late_abort_does_not_hit_a_new_request_of_the_same_name(engine: AsyncEngine) -> None:
    first = engine.submit([1, 2], SHORT, request_id="name")
    while engine.stats().generated_tokens < 12 or engine.stats().running:
        time.sleep(0.001)  # on purpose: the loop must not hear yet that the request has ended
    first.abort()

    second = await collect(engine.submit([3, 4], SHORT, request_id="name"))

    assert second.finished
    assert len(second.samples[0].token_ids) == 12


async def test_a_shutdown_during_submit_is_an_error_and_not_a_stream_without_end(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = engine._engine.check

    def shut_down_meanwhile(*arguments: Any) -> Request:
        engine.shutdown()
        return check(*arguments)

    monkeypatch.setattr(engine._engine, "check", shut_down_meanwhile)

    with pytest.raises(EngineStopped):
        engine.submit([1, 2], SHORT)


async def test_more_samples_than_may_ever_wait_are_refused_for_good(engine: AsyncEngine) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        engine.submit([1, 2], SamplingParams(n=9))

    assert refusal.value.field == "n"


async def test_seeds_are_filled_in(engine: AsyncEngine) -> None:
    drawn = engine.submit([1], SamplingParams(max_tokens=1), Activation("stochastic", p=0.8))
    given = engine.submit([1], SamplingParams(max_tokens=1, seed=7), Activation("stochastic", p=0.8))
    both = engine.submit([1], SamplingParams(max_tokens=1, seed=7), Activation("stochastic", p=0.8, seed=8))

    assert drawn.activation.seed == drawn.seed
    assert (given.seed, given.activation.seed) == (7, 7)
    assert (both.seed, both.activation.seed) == (7, 8)
    await asyncio.gather(*(collect(stream) for stream in (drawn, given, both)))


async def test_shutdown_ends_streams_with_an_error(model: str) -> None:
    engine = AsyncEngine(EngineConfig(model=model, kv_cache_mib=16))
    engine.start()
    stream = engine.submit([1, 2, 3], LONG)
    await anext(stream)

    await asyncio.to_thread(engine.shutdown)

    with pytest.raises(EngineStopped):
        await collect(stream)
    with pytest.raises(EngineStopped):
        engine.submit([1], SHORT)
    assert not engine.alive
    assert engine.stats().kv_blocks_used == 0
    engine.shutdown()


async def test_a_failing_engine_tells_every_reader(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(step: StepInputs) -> None:
        raise RuntimeError("a kernel failed")

    streams = [engine.submit([1, 2, 3], LONG) for _ in range(3)]
    await anext(streams[0])
    monkeypatch.setattr(engine._engine._runner.backend, "forward", fail)

    for stream in streams:
        with pytest.raises(EngineStopped):
            await collect(stream)

    assert not engine.alive
    with pytest.raises(EngineStopped):
        engine.submit([1], SHORT)
    assert engine.stats().kv_blocks_used == 0


async def test_logits_that_are_not_finite_end_one_request_only(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = engine._engine._runner.backend
    compute = backend.logits

    def poison_first_row(hidden: Tensor) -> Tensor:
        logits = compute(hidden)
        if len(logits) > 1:
            logits[0, 0] = float("nan")
        return logits

    monkeypatch.setattr(backend, "logits", poison_first_row)
    outputs = await asyncio.gather(*(collect(engine.submit([i + 1, 2, 3], SHORT)) for i in range(3)))

    reasons = [output.samples[0].finish_reason for output in outputs]
    assert FinishReason.ERROR in reasons
    assert FinishReason.LENGTH in reasons
    assert engine.alive
    assert engine.stats().kv_blocks_used == 0


def test_a_reader_whose_loop_is_gone_does_not_hurt_others(engine: AsyncEngine) -> None:
    async def start_and_leave() -> None:
        await anext(engine.submit([1, 2, 3], LONG))

    gone = threading.Thread(target=lambda: asyncio.run(start_and_leave()))
    gone.start()
    gone.join()

    output = asyncio.run(_submit_and_collect(engine))

    assert output.finished


async def _submit_and_collect(engine: AsyncEngine) -> RequestOutput:
    return await collect(engine.submit([4, 5, 6], SHORT))
