"""A step that is kept from one to the next equals one that is laid out anew, whatever happens to the batch."""

import random
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from engine.activation import ActivationRows, PositiveBranch
from engine.kv_cache import BLOCK_SIZE
from engine.request import Sequence
from engine.scheduler import StepPlan
from engine.step import StepInputs
from engine.step_builder import StepBuilder
from tests.engine.simulation import RELU, RELU_DECODE, SILU, Simulation, make_scored, make_sequences, stochastic

ACTIVATIONS = (SILU, RELU, RELU_DECODE, stochastic(p=0.8), stochastic(p=0.5, seed=2))


def skips(relu: int, rows: int) -> bool:
    return relu == rows


def tensors_of(part: StepInputs | ActivationRows) -> dict[str, Tensor]:
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def assert_same(kept: StepInputs, fresh: StepInputs) -> None:
    for mine, other in ((kept, fresh), (kept.activations, fresh.activations)):
        expected = tensors_of(other)
        for name, found in tensors_of(mine).items():
            if name == "block_tables":  # kept ones may be wider, after a sequence came back with fewer blocks
                columns = expected[name].shape[1]
                assert not found[:, columns:].any()
                found = found[:, :columns]
            torch.testing.assert_close(
                found, expected[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert kept.skip_zeros == fresh.skip_zeros


class Builds(Simulation):
    """A simulation that lays each plan out twice: by one builder for all, and by a new one."""

    def __init__(self, num_blocks: int, max_num_seqs: int = 8, budget: int = 256) -> None:
        super().__init__(num_blocks, max_num_seqs, budget)
        self.builder = StepBuilder(PositiveBranch.SILU, skips)
        self.last: StepInputs | None = None
        self.kept = 0

    def _check_plan(self, plan: StepPlan, due: list[Sequence]) -> None:
        super()._check_plan(plan, due)
        step = self.builder.build(plan)
        assert_same(step, StepBuilder(PositiveBranch.SILU, skips).build(plan))
        self.kept += step is self.last
        self.last = step


@pytest.mark.parametrize("seed", range(20))
def test_random_workloads(seed: int) -> None:
    choose = random.Random(seed)
    # In small pools sequences give up their blocks and get others; in large ones they decode side by side.
    simulation = Builds(num_blocks=choose.choice([8, 12, 100]), budget=choose.choice([16, 64, 256]))
    for _ in range(120):
        if choose.random() < 0.1 and len(simulation.scheduler.waiting) < 4:
            prompt = [choose.randrange(3) for _ in range(choose.choice([1, 5, 15, 16, 17, 40]))]
            activation = choose.choice(ACTIVATIONS)
            if choose.random() < 0.2:
                simulation.add(make_scored(prompt, activation))
            else:
                simulation.add(*make_sequences(prompt, activation, choose.randint(1, 60), choose.choice([1, 1, 3])))
        if simulation.scheduler.running and choose.random() < 0.02:
            simulation.finish(choose.choice(simulation.scheduler.running))
        if simulation.scheduler.has_work:
            simulation.step()
    assert simulation.kept > 10


def test_a_batch_that_decodes_is_kept_but_for_the_table_that_grows() -> None:
    simulation = Builds(num_blocks=100)
    simulation.add(*make_sequences([0] * 3, SILU, 40), *make_sequences([1] * 5, RELU, 40))
    steps = [simulation.last for _ in range(40) if simulation.step() is not None]
    # One for the prompts, one for the first tokens after them, and one for each block that the longer one begins.
    assert simulation.kept == len(steps) - 2 - (5 + 40 - 1) // BLOCK_SIZE


def test_an_activation_that_begins_after_the_prompt_is_not_missed() -> None:
    simulation = Builds(num_blocks=100)
    simulation.add(*make_sequences([0] * 3, RELU_DECODE, 10))
    simulation.step()
    assert simulation.last is not None
    assert not simulation.last.skip_zeros
    simulation.step()
    assert simulation.last.skip_zeros
