"""The decoder against transformers, in float32: every family, every backend, every way to cut a prompt into steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.activation import Activation, ActivationMode, PositiveBranch, apply_activation
from engine.errors import UnsupportedArchitecture
from engine.kernels.backend import Backend
from engine.kernels.cpu.backend import CpuBackend
from engine.kernels.reference import ReferenceBackend
from engine.kv_cache import KVCache
from engine.models import Checkpoint, load_checkpoint
from engine.step import StepInputs
from tests.engine.models.tiny import FAMILIES, VOCAB_SIZE, make_tiny
from tests.engine.steps import SILU, Chunk, activation_rows, blocks_of, step_inputs

TOLERANCE = 1e-4
LENGTH = 41  # longer than two blocks, and than the sliding window of 8
NUM_BLOCKS = 18
STOCHASTIC = Activation(ActivationMode.STOCHASTIC, p=0.6, seed=-9)
RELU = Activation(ActivationMode.RELU)
# How many tokens of the prompt each step computes.
CUTS = {"at once": [LENGTH], "in chunks": [13, 3, 1, 24], "token by token": [1] * LENGTH}

BACKENDS: dict[str, Callable[..., Backend]] = {
    "cpu": CpuBackend,
    "cpu-vectors": partial(CpuBackend, amx=False),
    "reference": ReferenceBackend,
}
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@dataclass(frozen=True)
class Tiny:
    """A tiny model, ours and transformers'."""

    checkpoint: Checkpoint
    model: PreTrainedModel

    def decoder(self, backend: str) -> Backend:
        """A decoder with an empty cache, whose garbage is NaN."""
        config, weights = self.checkpoint.config, self.checkpoint.weights
        cache = KVCache.allocate(config, NUM_BLOCKS, weights.embedding.dtype)
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
        return BACKENDS[backend](config, weights, cache)

    def expected(self, tokens: Sequence[int], activations: Sequence[Activation] = (), **options: Any) -> Tensor:
        """Logits [tokens, vocab] of transformers, with an activation for each token; SILU without."""
        layers = self.model.model.layers
        before = [layer.mlp.act_fn for layer in layers]
        if activations:
            for index, layer in enumerate(layers):
                layer.mlp.act_fn = DefinedActivation(index, activations, **options)
        try:
            logits: Tensor = self.model(torch.tensor([tokens])).logits[0]
        finally:
            for layer, act_fn in zip(layers, before, strict=True):
                layer.mlp.act_fn = act_fn
        return logits


class DefinedActivation(nn.Module):
    """Puts the activation's definition into a layer of transformers."""

    def __init__(
        self,
        layer: int,
        activations: Sequence[Activation],
        branch: PositiveBranch = PositiveBranch.SILU,
        sample: int = 0,
    ) -> None:
        super().__init__()
        self.layer = layer
        count = len(activations)
        self.rows = activation_rows(activations, range(count), branch, [sample] * count)

    def forward(self, gate: Tensor) -> Tensor:
        return apply_activation(gate[0], self.rows, self.layer)[None]


def load_tiny(family: str, folder: pytest.TempPathFactory, dtype: torch.dtype = torch.float32) -> Tiny:
    path = folder.mktemp(family)
    model = make_tiny(family, path)
    return Tiny(load_checkpoint(str(path), dtype=dtype, progress=lambda line: None), model)


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return load_tiny(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def one_of_two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return load_tiny(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return load_tiny("llama", tmp_path_factory)


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.inference_mode():
        yield


def prompt(length: int = LENGTH, seed: int = 0) -> list[int]:
    tokens: list[int] = torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


def logits_of(decoder: Backend, step: StepInputs) -> Tensor:
    """Logits of the rows that sample, all of them in these steps."""
    return decoder.logits(decoder.forward(step)[step.sample_rows]).clone()


def logits_in_steps(
    decoder: Backend,
    tokens: Sequence[int],
    cuts: Sequence[int],
    activation: Activation = SILU,
    *,
    blocks: Sequence[int] | None = None,
    sample: int = 0,
    branch: PositiveBranch = PositiveBranch.SILU,
    sparse: bool = False,
) -> Tensor:
    """Logits of every token, computed `cuts` tokens at a time."""
    logits, start = [], 0
    for count in cuts:
        chunk = Chunk(tokens[start : start + count], start, blocks or blocks_of(0, LENGTH), activation, sample)
        logits.append(logits_of(decoder, step_inputs([chunk], branch, sparse=sparse)))
        start += count
    return torch.cat(logits)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1  # else any small logits would do
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@every_backend
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_logits_of_every_family_equal_transformers(tiny: Tiny, cuts: list[int], backend: str) -> None:
    tokens = prompt()

    assert_close(logits_in_steps(tiny.decoder(backend), tokens, cuts), tiny.expected(tokens))


@every_backend
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("branch", PositiveBranch)
@pytest.mark.parametrize("activation", [STOCHASTIC, RELU], ids=["stochastic", "relu"])
def test_activations_equal_their_definition_inside_transformers(
    one_of_two: Tiny, activation: Activation, branch: PositiveBranch, cuts: list[int], backend: str
) -> None:
    tokens = prompt()
    expected = one_of_two.expected(tokens, [activation] * LENGTH, branch=branch, sample=3)

    found = logits_in_steps(one_of_two.decoder(backend), tokens, cuts, activation, sample=3, branch=branch)

    assert_close(found, expected)
    assert (expected - one_of_two.expected(tokens)).abs().max() > 1000 * TOLERANCE


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("branch", PositiveBranch)
def test_the_sparse_path_equals_relu_inside_transformers(tiny: Tiny, branch: PositiveBranch, cuts: list[int]) -> None:
    tokens = prompt()

    found, dense = (
        logits_in_steps(tiny.decoder("cpu"), tokens, cuts, RELU, branch=branch, sparse=sparse)
        for sparse in (True, False)
    )

    assert_close(found, tiny.expected(tokens, [RELU] * LENGTH, branch=branch))
    assert torch.equal(found, dense)


@every_backend
@pytest.mark.parametrize("activation", [STOCHASTIC, RELU], ids=["stochastic", "relu"])
def test_an_activation_from_the_middle_of_a_sequence_on(llama: Tiny, activation: Activation, backend: str) -> None:
    """Scope "decode": the prompt in SILU, the rest in the request's mode; here both in one step."""
    tokens, half = prompt(), 20
    blocks = blocks_of(0, LENGTH)
    step = step_inputs([Chunk(tokens[:half], 0, blocks), Chunk(tokens[half:], half, blocks, activation)], sparse=True)

    found = logits_of(llama.decoder(backend), step)

    assert_close(found, llama.expected(tokens, [SILU] * half + [activation] * (LENGTH - half)))


@dataclass(frozen=True)
class Member:
    """A sequence of a mixed batch: all but its last `count` tokens are in the cache already."""

    length: int
    count: int
    activation: Activation
    sample: int = 0


MEMBERS = [
    Member(30, 1, SILU),
    Member(17, 9, STOCHASTIC),
    Member(16, 1, RELU),
    Member(9, 9, RELU),
    Member(33, 1, STOCHASTIC, sample=1),
    Member(25, 25, SILU),
]


def run_mixed(decoder: Backend, *, sparse: bool) -> list[Tensor]:
    """Logits of each member's last tokens, all in one step."""
    chunks = []
    for index, member in enumerate(MEMBERS):
        tokens, start = prompt(member.length, index), member.length - member.count
        blocks = blocks_of(index, 33, len(MEMBERS))[: member.length // 16 + 1]
        if start:
            earlier = Chunk(tokens[:start], 0, blocks, member.activation, member.sample)
            decoder.forward(step_inputs([earlier], sparse=sparse))
        chunks.append(Chunk(tokens[start:], start, blocks, member.activation, member.sample))
    logits = logits_of(decoder, step_inputs(chunks, sparse=sparse))
    return [*torch.split(logits, [member.count for member in MEMBERS])]


@every_backend
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_step_of_prompts_and_decoding_rows_in_all_modes(one_of_two: Tiny, sparse: bool, backend: str) -> None:
    for index, (member, found) in enumerate(
        zip(MEMBERS, run_mixed(one_of_two.decoder(backend), sparse=sparse), strict=True)
    ):
        tokens = prompt(member.length, index)
        expected = one_of_two.expected(tokens, [member.activation] * member.length, sample=member.sample)
        assert_close(found, expected[-member.count :])


@pytest.mark.parametrize("backend", ["cpu", "cpu-vectors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_sequence_is_bit_identical_alone_and_in_a_mixed_step(
    sparse: bool, dtype: torch.dtype, backend: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whether zeros are skipped when it is alone or not."""
    tiny = load_tiny("qwen3", tmp_path_factory, dtype)
    together = run_mixed(tiny.decoder(backend), sparse=sparse)

    for index, (member, found) in enumerate(zip(MEMBERS, together, strict=True)):
        alone = logits_in_steps(
            tiny.decoder(backend),
            prompt(member.length, index),
            [1] * member.length,
            member.activation,
            sample=member.sample,
            sparse=not sparse,
        )
        assert torch.equal(found, alone[-member.count :])


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("activation", [SILU, STOCHASTIC, RELU], ids=[*ActivationMode])
def test_where_blocks_lie_does_not_matter(llama: Tiny, activation: Activation, cuts: list[int]) -> None:
    tokens = prompt()
    here, there = (
        logits_in_steps(llama.decoder("cpu"), tokens, cuts, activation, blocks=blocks)
        for blocks in ([0, 1, 2], [9, 4, 15])
    )

    assert torch.equal(here, there)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("activation", [SILU, STOCHASTIC, RELU], ids=[*ActivationMode])
def test_bfloat16_is_as_near_to_float32_as_its_rounding_allows(
    activation: Activation, sparse: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The kernels err no more than plain PyTorch in bfloat16 does."""
    tiny, tokens = load_tiny("llama", tmp_path_factory, torch.bfloat16), prompt()
    exact = tiny.expected(tokens, [activation] * LENGTH)
    kernels, plain = (
        logits_in_steps(tiny.decoder(backend), tokens, [LENGTH], activation, sparse=sparse)
        for backend in ("cpu", "reference")
    )

    # The kernels' last sum is not rounded.
    assert (kernels.dtype, plain.dtype) == (torch.float32, torch.bfloat16)
    error, allowed = (float((found.float() - exact).std() / exact.std()) for found in (kernels, plain))
    assert error < 1.5 * allowed < 0.1


@every_backend
def test_only_the_rows_asked_for_become_logits(llama: Tiny, backend: str) -> None:
    tokens = prompt()
    step = step_inputs([Chunk(tokens, 0, blocks_of(0, LENGTH))])
    some = torch.tensor([40, 3])

    found = logits_of(llama.decoder(backend), replace(step, sample_rows=some))

    assert_close(found, llama.expected(tokens)[some])


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_backends_count_the_same_zeros(llama: Tiny, sparse: bool) -> None:
    counted = []
    for backend in ("cpu", "reference"):
        decoder = llama.decoder(backend)
        run_mixed(decoder, sparse=sparse)
        counted.append(decoder.sparsity.by_mode())
    (zeros, elements), (reference_zeros, reference_elements) = counted
    rows = {mode: sum(m.length for m in MEMBERS if m.activation.mode is mode) for mode in ActivationMode}

    assert elements == reference_elements == {mode: [rows[mode] * 128] * 3 for mode in ActivationMode}
    for mode in ActivationMode:
        # Beside 0 lie values that another order of summation moves across it.
        assert zeros[mode] == pytest.approx(reference_zeros[mode], abs=2)
    assert zeros[ActivationMode.SILU] == [0, 0, 0]
    for relu, stochastic in zip(zeros[ActivationMode.RELU], zeros[ActivationMode.STOCHASTIC], strict=True):
        assert 0.3 < relu / elements[ActivationMode.RELU][0] < 0.7
        # 1 - p of the negative half
        assert 0.15 < stochastic / elements[ActivationMode.STOCHASTIC][0] < 0.25


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_size": 48}, "hidden_size 48 is no multiple of 32"),
        ({"intermediate_size": 144}, "intermediate_size 144 is no multiple of 32"),
        ({"head_dim": 16, "num_attention_heads": 1, "num_key_value_heads": 1}, "q_size 16 is no multiple of 32"),
        ({"head_dim": 8}, "head_dim 8 is no multiple of 16"),
    ],
)
def test_widths_that_the_cpu_kernels_cannot_take_are_refused(
    changes: dict[str, Any], problem: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("narrow")
    model = make_tiny("llama", path, **changes)
    tiny, tokens = Tiny(load_checkpoint(str(path), dtype=torch.float32, progress=lambda line: None), model), prompt()

    with pytest.raises(UnsupportedArchitecture, match=f"{problem}.*reference kernels"):
        tiny.decoder("cpu")
    assert_close(logits_in_steps(tiny.decoder("reference"), tokens, [LENGTH]), tiny.expected(tokens))


@pytest.mark.parametrize("backend", ["cpu", "cpu-vectors"])
class TestCounts:
    def test_of_draws_are_those_of_the_reference(self, llama: Tiny, backend: str) -> None:
        chunks = [
            Chunk(prompt(9, seed), 0, blocks_of(seed, 9, 4), activation)
            for seed, activation in enumerate((SILU, STOCHASTIC, replace(STOCHASTIC, p=0.2), RELU))
        ]
        found, expected = llama.decoder(backend), llama.decoder("reference")

        for decoder in (found, expected):
            decoder.forward(step_inputs(chunks))

        assert expected.draws.negatives > 0
        assert found.draws.negatives == pytest.approx(expected.draws.negatives, rel=0.01)  # signs of tiny values differ
        assert found.draws.kept == pytest.approx(expected.draws.kept, rel=0.01)
        assert found.draws.kept == pytest.approx(found.draws.expected, rel=0.2)

    def test_of_neurons_without_skipping_are_all(self, llama: Tiny, backend: str) -> None:
        decoder, config = llama.decoder(backend), llama.checkpoint.config

        decoder.forward(step_inputs([Chunk(prompt(5), 0, blocks_of(0, 5), RELU)]))

        assert decoder.neurons_read == config.num_layers * config.intermediate_size

    def test_of_neurons_that_one_row_needs_are_its_active_ones(self, llama: Tiny, backend: str) -> None:
        decoder = llama.decoder(backend)

        decoder.forward(step_inputs([Chunk(prompt(1), 0, blocks_of(0, 1), RELU)], sparse=True))

        zeros, elements = decoder.sparsity.share(ActivationMode.RELU)
        assert 0 < zeros < elements
        assert decoder.neurons_read == elements - zeros

    def test_of_neurons_that_some_row_needs_are_their_union(self, llama: Tiny, backend: str) -> None:
        decoder, config = llama.decoder(backend), llama.checkpoint.config

        decoder.forward(step_inputs([Chunk(prompt(4), 0, blocks_of(0, 4), RELU)], sparse=True))

        zeros, elements = decoder.sparsity.share(ActivationMode.RELU)
        assert decoder.neurons_read is not None
        assert (
            (elements - zeros) / 4
            < decoder.neurons_read
            < min(elements - zeros, config.num_layers * config.intermediate_size)
        )
