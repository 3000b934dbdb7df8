"""Feed-forwards as a step runs them, in mixed modes, sparse and dense."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.activation import Activation, ActivationMode, PositiveBranch, apply_activation
from engine.kernels.cpu.backend import CpuBackend
from engine.kv_cache import KVCache
from engine.models.config import DecoderConfig, DecoderWeights, LayerWeights
from engine.step import StepInputs
from tests.engine.kernels.kinds import BFLOAT16, Kind, every_kind, normal, only_amx
from tests.engine.kernels.threads import numba_threads
from tests.engine.steps import SILU, Chunk, select, step_inputs

RELU = Activation(ActivationMode.RELU)
STOCHASTIC = Activation(ActivationMode.STOCHASTIC, p=0.6, seed=-9)
MIXTURE = [RELU, SILU, RELU, STOCHASTIC, Activation(ActivationMode.STOCHASTIC, p=0.2, seed=5), RELU, RELU]
MODES = {"mixed": MIXTURE, "all relu": [RELU], "no relu": [SILU, STOCHASTIC]}
LAYERS, LAYER = 3, 1  # the others hold NaN
HIDDEN, INTERMEDIATE = 96, 544  # no multiple of 64; parts of different sizes
BRANCHES = list(PositiveBranch)

both_paths = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
every_branch = pytest.mark.parametrize("branch", BRANCHES)


@dataclass(frozen=True)
class FeedForward:
    """One layer's weights between those of others, which must not be read."""

    kind: Kind
    backend: CpuBackend

    @classmethod
    def make(
        cls, kind: Kind, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE, weights: DecoderWeights | None = None
    ) -> "FeedForward":
        config = _config(hidden, intermediate)
        weights = _weights(config, kind.dtype) if weights is None else weights
        return cls(kind, CpuBackend(config, weights, KVCache.allocate(config, 1, kind.dtype), amx=kind.amx))

    @property
    def weights(self) -> LayerWeights:
        return self.backend.weights.layers[LAYER]

    def __call__(self, x: Tensor, step: StepInputs) -> Tensor:
        return self.backend.feed_forward(LAYER, x, step)

    def gate(self, x: Tensor) -> Tensor:
        """float64 [rows, intermediate]."""
        return self.kind.rounded(x) @ self.weights.gate.double().T

    def expected(self, x: Tensor, step: StepInputs) -> Tensor:
        """The definition, in float64."""
        activated = apply_activation(self.gate(x).float(), step.activations, LAYER).double()
        return (activated * (self.kind.rounded(x) @ self.weights.up.double().T)) @ self.weights.down.double()


def _config(hidden: int, intermediate: int) -> DecoderConfig:
    return DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=LAYERS,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position=64,
        tie_embeddings=True,
        sliding_window=(None,) * LAYERS,
        use_rope=(True,) * LAYERS,
    )


def _weights(config: DecoderConfig, dtype: torch.dtype) -> DecoderWeights:
    hidden, intermediate = config.hidden_size, config.intermediate_size

    def stacked(*shape: int, seed: int, scale: float) -> Tensor:
        weight = torch.full((LAYERS, *shape), torch.nan, dtype=dtype)
        weight[LAYER] = normal(*shape, seed=seed, dtype=dtype, scale=scale)
        return weight

    def unused(*shape: int) -> Tensor:
        return torch.full((LAYERS, *shape), torch.nan, dtype=dtype)

    layers = LayerWeights(
        input_norm=unused(hidden),
        qkv=unused(config.q_size + 2 * config.kv_size, hidden),
        qkv_bias=None,
        q_norm=None,
        k_norm=None,
        o=unused(hidden, config.q_size),
        o_bias=None,
        post_norm=unused(hidden),
        gate=stacked(intermediate, hidden, seed=1, scale=2 * hidden**-0.5),
        up=stacked(intermediate, hidden, seed=2, scale=hidden**-0.5),
        down=stacked(intermediate, hidden, seed=3, scale=intermediate**-0.5),
    )
    embedding = normal(config.vocab_size, hidden, seed=4, dtype=dtype)
    return DecoderWeights(embedding, layers, normal(hidden, seed=5, dtype=dtype), embedding, torch.ones(8))


@cache
def feed_forward_of(kind: Kind) -> FeedForward:
    return FeedForward.make(kind)


def step_of(
    rows: int,
    activations: Sequence[Activation] = MIXTURE,
    branch: PositiveBranch = PositiveBranch.SILU,
    *,
    sparse: bool,
) -> StepInputs:
    """A step of generated tokens, each at another position of another sequence."""
    chunks = [Chunk([0], 5 * row % 16, [0], activations[row % len(activations)], sample=row) for row in range(rows)]
    return step_inputs(chunks, branch, sparse=sparse)


def rows_of(count: int, hidden: int = HIDDEN) -> Tensor:
    return normal(count, hidden, seed=count)


def alone(step: StepInputs, row: int) -> StepInputs:
    """One row of the step."""
    return replace(
        step,
        positions=step.positions[row : row + 1],
        activations=select(step.activations, slice(row, row + 1)),
    )


def assert_close(kind: Kind, found: Tensor, exact: Tensor) -> None:
    """Sums in float32; tiles round act(gate) * up to bfloat16 in between."""
    error, size = (found.double() - exact).abs(), exact.abs().max()
    assert error.max() < (2.0**-7 if kind.amx else 2.0**-18) * size


@every_kind
@both_paths
@every_branch
@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 33])
def test_equals_the_definition(rows: int, modes: str, branch: PositiveBranch, sparse: bool, kind: Kind) -> None:
    feed_forward, x, step = feed_forward_of(kind), rows_of(rows), step_of(rows, MODES[modes], branch, sparse=sparse)
    expected = feed_forward.expected(x, step)
    assert expected.std() > 0.1  # else any small output would do

    assert_close(kind, feed_forward(x, step), expected)


@every_kind
@settings(deadline=None, max_examples=25)
@given(hidden=st.integers(1, 9), blocks=st.integers(1, 40), rows=st.integers(1, 20), sparse=st.booleans())
def test_any_width(kind: Kind, hidden: int, blocks: int, rows: int, sparse: bool) -> None:
    feed_forward = FeedForward.make(kind, 32 * hidden, 32 * blocks)
    x, step = rows_of(rows, 32 * hidden), step_of(rows, sparse=sparse)

    assert_close(kind, feed_forward(x, step), feed_forward.expected(x, step))


@every_kind
@both_paths
@every_branch
@pytest.mark.parametrize("rows", [2, 3, 9, 16, 17, 33])
def test_a_row_is_bit_identical_alone_and_among_others(
    rows: int, branch: PositiveBranch, sparse: bool, kind: Kind
) -> None:
    feed_forward, x, step = feed_forward_of(kind), rows_of(rows), step_of(rows, branch=branch, sparse=sparse)
    together = feed_forward(x, step)

    for row in range(rows):
        assert torch.equal(feed_forward(x[row : row + 1], alone(step, row)), together[row : row + 1])


@every_kind
@both_paths
def test_threads_do_not_change_the_bits(sparse: bool, kind: Kind) -> None:
    outputs = []
    for threads in (1, 2):
        with numba_threads(threads):
            feed_forward = FeedForward.make(kind)
            outputs += [feed_forward(rows_of(rows), step_of(rows, sparse=sparse)) for rows in (1, 9, 33)]

    for one, two in zip(outputs[:3], outputs[3:], strict=True):
        assert torch.equal(one, two)


@every_kind
@both_paths
@pytest.mark.parametrize("threads", [3, 5, 8])
def test_a_number_of_threads_that_divides_nothing_does_not_change_the_bits(
    threads: int, sparse: bool, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:  # fewer will do the work of so many
        patched.setattr("engine.kernels.cpu.backend.numba.get_num_threads", lambda: threads)
        many = FeedForward.make(kind)

    for rows in (1, 2, 3, 8, 9, 33):
        x, step = rows_of(rows), step_of(rows, sparse=sparse)
        assert torch.equal(many(x, step), feed_forward_of(kind)(x, step))


@every_kind
@both_paths
def test_what_an_earlier_step_left_in_memory_does_not_matter(sparse: bool, kind: Kind) -> None:
    used, fresh = FeedForward.make(kind), FeedForward.make(kind)
    used(torch.full((40, HIDDEN), torch.nan), step_of(40, sparse=sparse))
    used(torch.full((40, HIDDEN), torch.inf), step_of(40, [SILU], sparse=sparse))

    for rows in (1, 3, 16, 20):
        x, step = rows_of(rows), step_of(rows, sparse=sparse)
        assert torch.equal(used(x, step), fresh(x, step))


@every_kind
@both_paths
@pytest.mark.parametrize("rows", [3, 20])
def test_a_row_that_is_not_finite_hurts_no_other(rows: int, sparse: bool, kind: Kind) -> None:
    feed_forward, x, step = feed_forward_of(kind), rows_of(rows), step_of(rows, sparse=sparse)
    expected = feed_forward(x, step)
    others = torch.arange(rows) != 1
    x[1] = torch.inf

    assert torch.equal(feed_forward(x, step)[others], expected[others])


@every_kind
@every_branch
@pytest.mark.parametrize("modes", MODES)
@pytest.mark.parametrize("rows", [1, 2, 4, 9, 17, 33])
def test_skipping_zeros_gives_the_same_bits(rows: int, modes: str, branch: PositiveBranch, kind: Kind) -> None:
    feed_forward, x = feed_forward_of(kind), rows_of(rows)

    sparse, dense = (feed_forward(x, step_of(rows, MODES[modes], branch, sparse=skip)) for skip in (True, False))

    assert torch.equal(sparse, dense)


@only_amx
@both_paths
def test_tiles_are_as_near_to_vectors_as_their_rounding_allows(sparse: bool, kind: Kind) -> None:
    x, step = rows_of(33), step_of(33, sparse=sparse)

    tiles, vectors = (feed_forward_of(one)(x, step) for one in (kind, BFLOAT16))

    # Rows, and act(gate) * up of dense ones, are rounded to 8 bits.
    assert 0 < (tiles - vectors).std() < 2.0**-7 * vectors.std()


@every_kind
@every_branch
@pytest.mark.parametrize("rows", [1, 5])
def test_nothing_active_is_exactly_zero(rows: int, branch: PositiveBranch, kind: Kind) -> None:
    feed_forward = FeedForward.make(kind)
    feed_forward.weights.gate.abs_().neg_()
    x = rows_of(rows).abs()

    for sparse in (False, True):
        found = feed_forward(x, step_of(rows, [RELU], branch, sparse=sparse))
        assert torch.equal(found, torch.zeros(rows, HIDDEN))


@every_kind
def test_weights_of_neurons_that_no_row_uses_are_not_read(kind: Kind) -> None:
    feed_forward, x, step = FeedForward.make(kind), rows_of(2), step_of(2, [RELU], sparse=True)
    expected = feed_forward(x, step)

    unused = (feed_forward.gate(x) < -0.1).all(0)
    feed_forward.weights.up[unused] = feed_forward.weights.down[unused] = torch.nan

    assert 0.1 < unused.double().mean() < 0.9
    assert torch.equal(feed_forward(x, step), expected)


@every_kind
def test_a_zero_times_a_weight_that_is_not_finite_counts_where_zeros_are_not_skipped(kind: Kind) -> None:
    """Else the test above could not fail."""
    feed_forward, x = FeedForward.make(kind), rows_of(2)
    feed_forward.weights.down[(feed_forward.gate(x) < -0.1).all(0)] = torch.nan

    assert feed_forward(x, step_of(2, [RELU], sparse=False)).isnan().all()
