"""Thousands of random workloads: whatever comes, every plan is sound and every sequence gets all its tokens."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.activation import Activation, Scope
from engine.kv_cache import blocks_for
from engine.request import Sequence
from tests.engine.simulation import RELU, RELU_DECODE, SILU, Simulation, make_scored, make_sequences, stochastic

# Few texts, activations and lengths around block borders: much is shared, and much only looks as if it could be.
# The last text is what the simulation generates after the first.
TEXTS = ([0] * 80, [0] * 18 + [1] * 62, [1, 2, 0] * 27)
ACTIVATIONS = (
    SILU,
    RELU,
    RELU_DECODE,
    stochastic(p=0.8),
    stochastic(p=0.8, seed=2),
    stochastic(p=0.5),
    stochastic(p=0.0),
    stochastic(p=1.0),
    stochastic(scope=Scope.DECODE),
)
LENGTHS = st.one_of(st.integers(1, 80), st.sampled_from([15, 16, 17, 31, 32, 33, 48]))


@dataclass(frozen=True)
class Arrival:
    """A request.

    Attributes:
        step: When it comes.
        text: Its prompt is the beginning of this one of `TEXTS`; None: of an earlier sequence's prompt and output, as
            in the next turn of a conversation.
        scored: Its log-probabilities are wanted and no text; `n` and `max_tokens` do not count.
        patience: Steps after which it is aborted if it is not finished; None waits for ever.
    """

    step: int
    text: int | None
    length: int
    activation: int
    n: int
    max_tokens: int
    scored: bool
    patience: int | None

    def sequences(self, prompt: list[int], activation: Activation) -> list[Sequence]:
        if self.scored:
            return [make_scored(prompt, activation)]
        return make_sequences(prompt, activation, self.max_tokens, self.n)


@dataclass(frozen=True)
class Workload:
    """Requests, and the engine they come to.

    Attributes:
        activations: What the requests choose from; few, so that many are alike.
        failures: Steps that are planned and not carried out.
    """

    arrivals: list[Arrival]
    activations: list[Activation]
    spare_blocks: int
    max_num_seqs: int
    spare_budget: int
    prefix_caching: bool
    failures: set[int]


ARRIVALS = st.builds(
    Arrival,
    step=st.integers(0, 30),
    text=st.one_of(st.none(), st.integers(0, len(TEXTS) - 1)),
    length=LENGTHS,
    activation=st.integers(0, 2),
    n=st.sampled_from([1, 1, 1, 2, 3]),
    max_tokens=st.integers(1, 40),
    scored=st.sampled_from([False, False, False, True]),
    patience=st.one_of(st.none(), st.none(), st.integers(0, 20)),
)
WORKLOADS = st.builds(
    Workload,
    arrivals=st.lists(ARRIVALS, min_size=1, max_size=8),
    activations=st.lists(st.sampled_from(ACTIVATIONS), min_size=1, max_size=3),
    spare_blocks=st.integers(0, 12),
    max_num_seqs=st.integers(1, 6),
    spare_budget=st.sampled_from([0, 1, 7, 16, 40, 100]),
    prefix_caching=st.sampled_from([True, True, True, False]),
    failures=st.one_of(st.just(set()), st.sets(st.integers(0, 40), max_size=3)),
)


def play(workload: Workload) -> Simulation:
    """Let requests come and go at their times, then let the rest finish. The simulation checks every step."""
    longest = max(arrival.length + arrival.max_tokens for arrival in workload.arrivals)
    simulation = Simulation(
        num_blocks=blocks_for(longest) + workload.spare_blocks,
        max_num_seqs=workload.max_num_seqs,
        budget=workload.max_num_seqs + workload.spare_budget,
        prefix_caching=workload.prefix_caching,
    )
    samples: dict[int, list[Sequence]] = {}  # of each arrival, by its number
    for now in range(52):  # the last request comes at step 30 and has patience for 20
        for number, arrival in enumerate(workload.arrivals):
            if arrival.step == now:
                activation = workload.activations[arrival.activation % len(workload.activations)]
                prompt = prompt_of(arrival, simulation.arrived)
                samples[number] = arrival.sequences(prompt, activation)
                simulation.add(*samples[number])
            if arrival.patience is not None and arrival.step + arrival.patience == now:
                for sequence in samples[number]:
                    if sequence not in simulation.gone:
                        simulation.finish(sequence)
        if simulation.scheduler.has_work:
            simulation.step(fails=now in workload.failures)
    simulation.run()
    return simulation


def prompt_of(arrival: Arrival, earlier: list[Sequence]) -> list[int]:
    if arrival.text is not None:
        return TEXTS[arrival.text][: arrival.length]
    said = earlier[arrival.length % len(earlier)].token_ids if earlier else TEXTS[0]
    return said[: arrival.length]


@settings(max_examples=1200, deadline=None)
@given(workload=WORKLOADS)
def test_every_plan_is_sound_and_every_sequence_is_finished(workload: Workload) -> None:
    simulation = play(workload)

    assert simulation.gone == set(simulation.arrived)
    assert len(simulation.arrived) == sum(1 if arrival.scored else arrival.n for arrival in workload.arrivals)
    assert simulation.pool.num_free == simulation.pool.num_blocks
    if all(arrival.patience is None for arrival in workload.arrivals):
        assert all(s.num_generated == s.request.max_tokens for s in simulation.arrived)
