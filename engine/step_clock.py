"""Where the time of a step goes."""

import time
from enum import StrEnum


class StepPhase(StrEnum):
    """Parts of a step, in their order."""

    SCHEDULE = "schedule"  # deciding what runs
    PREPARE = "prepare"  # laying out token rows, choosing the feed-forward's path
    LAYERS = "layers"  # all decoder layers
    HEAD = "head"  # output matrix: logits
    SAMPLE = "sample"  # next tokens, and log-probabilities of prompts that are scored (their logits, too)
    DELIVER = "deliver"  # text, stop conditions


class StepClock:
    """Cumulative seconds of each phase; a lap costs one look at the clock.

    Used by the engine thread; any thread may read `seconds`.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(StepPhase, 0.0)
        self._last = 0.0

    def start(self) -> None:
        """A step begins."""
        self._last = time.perf_counter()

    def lap(self, phase: StepPhase) -> None:
        """What has passed since the last lap belonged to this phase."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def reset(self) -> None:
        """Forget all seconds."""
        self.seconds = dict.fromkeys(StepPhase, 0.0)
