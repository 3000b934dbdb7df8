"""The synchronous engine: steps, aborts between steps, interrupted steps."""

from dataclasses import replace

import pytest

from engine import Activation, EngineConfig, RequestOutput, SamplingParams
from engine.engine import Engine
from engine.scheduler import StepPlan
from tests.engine.models.tiny import make_tiny

SAMPLING = SamplingParams(temperature=0.7, seed=3, max_tokens=40, ignore_eos=True)
PROMPT = list(range(1, 60))


@pytest.fixture
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("model")
    make_tiny("llama", folder)
    return Engine(EngineConfig(model=str(folder), kv_cache_mib=16))


def run(engine: Engine, prompt: list[int], sampling: SamplingParams = SAMPLING) -> RequestOutput:
    """Run one request to its end, alone or with what else the engine has to do."""
    request = engine.check("r", prompt, sampling, Activation())
    engine.add(request)
    whole: RequestOutput | None = None
    while whole is None or not whole.finished:
        for piece in engine.step():
            if piece.request_id != "r":
                continue
            if whole is None:
                whole = piece
            else:
                whole.extend(piece)
    return whole


def test_a_step_without_work_does_nothing(engine: Engine) -> None:
    assert not engine.has_work
    assert engine.step() == []
    assert engine.stats().steps == 0


def test_a_piece_for_each_step_and_one_token_in_each(engine: Engine) -> None:
    engine.add(engine.check("r", PROMPT, SAMPLING, Activation()))
    pieces = []
    while engine.has_work:
        pieces += engine.step()

    assert [len(piece.samples[0].token_ids) for piece in pieces] == [1] * 40
    assert engine.stats().generated_tokens == 40
    assert engine.stats().prompt_tokens == len(PROMPT)


def test_abort_frees_all_samples_at_once(engine: Engine) -> None:
    engine.add(engine.check("r", PROMPT, replace(SAMPLING, n=5), Activation()))
    engine.step()
    assert engine.stats().kv_blocks_used > 0

    engine.abort("r")

    assert engine.stats().kv_blocks_used == 0
    assert not engine.has_work
    engine.abort("r")
    assert engine.stats().aborted == 1


def test_samples_of_a_prompt_share_its_prefill(engine: Engine) -> None:
    engine.add(engine.check("r", PROMPT, replace(SAMPLING, n=4), Activation("stochastic", p=0.8, scope="decode")))
    while engine.has_work:
        engine.step()

    assert engine.stats().prefix_cache_hits == 3 * (len(PROMPT) // 16 * 16)


def test_stop_strings_do_not_count_before_min_tokens(engine: Engine) -> None:
    free = run(engine, PROMPT).samples[0]
    stop = free.text[0]

    held = run(engine, PROMPT, replace(SAMPLING, stop=(stop,), min_tokens=10)).samples[0]

    assert run(engine, PROMPT, replace(SAMPLING, stop=(stop,))).samples[0].stop_reason == stop
    assert held.text.startswith(stop)
    assert len(held.token_ids) >= 10


def test_an_interruption_while_tokens_are_handed_out_loses_no_sequence(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    engine.add(engine.check("other", PROMPT, SAMPLING, Activation()))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_advance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step()

    tokens = 0
    while engine.has_work:
        tokens += sum(len(sample.token_ids) for piece in engine.step() for sample in piece.samples)
    assert tokens == 40


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_step_leaves_no_false_promise_in_the_cache(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    """Blocks are findable as soon as a step is planned. If it is interrupted, they hold nothing."""
    expected = run(engine, PROMPT).samples
    other = [token + 100 for token in PROMPT]
    untouched = run(engine, other).samples

    def interrupt(plan: StepPlan) -> None:
        raise interruption

    fresh = Engine(engine.config)
    fresh.add(fresh.check("interrupted", PROMPT, SAMPLING, Activation()))
    with monkeypatch.context() as patch:
        patch.setattr(fresh._runner, "run", interrupt)
        with pytest.raises(interruption):
            fresh.step()

    assert run(fresh, PROMPT).samples == expected
    assert run(fresh, other).samples == untouched
    assert fresh.stats().kv_blocks_used == 0
