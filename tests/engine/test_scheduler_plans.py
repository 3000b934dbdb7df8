"""Thousands of random workloads: whatever comes, every plan is sound and every sequence gets all its tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.activation import Scope
from engine.kv_cache import blocks_for
from engine.request import Sequence
from tests.engine.simulation import RELU, RELU_DECODE, SILU, Simulation, make_sequences, stochastic

# Few texts, activations and lengths around block borders: much is shared, and much only looks as if it could be.
TEXTS = ([0] * 80, [0] * 18 + [1] * 62, [1, 2] * 40)
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
    """A request that comes after `step` steps; `leaves` of its samples are aborted that many steps later."""

    step: int
    text: int
    length: int
    activation: int
    n: int
    max_tokens: int
    patience: int | None


@dataclass(frozen=True)
class Workload:
    arrivals: list[Arrival]
    spare_blocks: int
    max_num_seqs: int
    spare_budget: int
    prefix_caching: bool
    failures: set[int]  # steps that are planned and not carried out


WORKLOADS = st.builds(
    Workload,
    arrivals=st.lists(
        st.builds(
            Arrival,
            step=st.integers(0, 30),
            text=st.integers(0, len(TEXTS) - 1),
            length=LENGTHS,
            activation=st.integers(0, len(ACTIVATIONS) - 1),
            n=st.sampled_from([1, 1, 1, 2, 3]),
            max_tokens=st.integers(1, 40),
            patience=st.one_of(st.none(), st.none(), st.integers(0, 20)),
        ),
        min_size=1,
        max_size=8,
    ),
    spare_blocks=st.integers(0, 12),
    max_num_seqs=st.integers(1, 6),
    spare_budget=st.sampled_from([0, 1, 7, 16, 40, 100]),
    prefix_caching=st.sampled_from([True, True, True, False]),
    failures=st.one_of(st.just(set()), st.sets(st.integers(0, 40), max_size=3)),
)


def simulation_of(workload: Workload) -> Simulation:
    longest = max(arrival.length + arrival.max_tokens for arrival in workload.arrivals)
    return Simulation(
        num_blocks=blocks_for(longest) + workload.spare_blocks,
        max_num_seqs=workload.max_num_seqs,
        budget=workload.max_num_seqs + workload.spare_budget,
        prefix_caching=workload.prefix_caching,
    )


def play(simulation: Simulation, workload: Workload) -> None:
    """Let requests come and go at their times, then let the rest finish. The simulation checks every step."""
    events: list[tuple[int, Callable[..., None], list[Sequence]]] = []
    for arrival in workload.arrivals:
        prompt = TEXTS[arrival.text][: arrival.length]
        sequences = make_sequences(prompt, ACTIVATIONS[arrival.activation], arrival.max_tokens, arrival.n)
        events.append((arrival.step, simulation.add, sequences))
        if arrival.patience is not None:
            events.append((arrival.step + arrival.patience, partial(abort, simulation), sequences))
    events.sort(key=lambda event: event[0])
    for now in range(events[-1][0] + 1):
        for when, happens, sequences in events:
            if when == now:
                happens(*sequences)
        if simulation.scheduler.has_work:
            simulation.step(fails=now in workload.failures)
    simulation.run()


def abort(simulation: Simulation, *sequences: Sequence) -> None:
    for sequence in sequences:
        if sequence not in simulation.gone:
            simulation.finish(sequence)


@settings(max_examples=1500, deadline=None)
@given(workload=WORKLOADS)
def test_every_plan_is_sound_and_every_sequence_is_finished(workload: Workload) -> None:
    simulation = simulation_of(workload)

    play(simulation, workload)

    assert simulation.gone == set(simulation.arrived)
    assert simulation.pool.num_free == simulation.pool.num_blocks
    if all(arrival.patience is None for arrival in workload.arrivals):
        assert all(s.num_generated == s.request.max_tokens for s in simulation.arrived)
