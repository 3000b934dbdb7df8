"""Each moment between a start and the last lap belongs to one phase."""

import time

import pytest

from engine.step_clock import StepClock, StepPhase


def test_laps_add_up_to_what_passed() -> None:
    clock = StepClock()
    before = time.perf_counter()
    for _ in range(3):
        clock.start()
        for phase in StepPhase:
            time.sleep(0.001)
            clock.lap(phase)
    passed = time.perf_counter() - before

    assert all(seconds >= 0.003 for seconds in clock.seconds.values())
    assert sum(clock.seconds.values()) <= passed


def test_time_between_steps_belongs_to_no_phase() -> None:
    clock = StepClock()
    clock.start()
    clock.lap(StepPhase.SCHEDULE)
    time.sleep(0.05)
    clock.start()
    clock.lap(StepPhase.PREPARE)

    assert clock.seconds[StepPhase.PREPARE] < 0.05


def test_all_is_forgotten_after_a_reset() -> None:
    clock = StepClock()
    clock.start()
    clock.lap(StepPhase.LAYERS)

    clock.reset()

    assert clock.seconds == dict.fromkeys(StepPhase, pytest.approx(0.0))
