"""Quantised weights: what is stored, how near it is to the weights, and what it does to a model's text."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor

from engine import (
    LLM,
    Activation,
    ActivationMode,
    DType,
    EngineConfig,
    InvalidConfig,
    KernelSet,
    Quantization,
    SamplingParams,
    UnsupportedArchitecture,
)
from engine.kernels.cpu.backend import CpuBackend
from engine.kernels.cpu.formats import as_array
from engine.kernels.cpu.isa import has_amx
from engine.kernels.cpu.quantise import quantise_down, quantise_int4, quantise_int8
from engine.kernels.cpu.quantised import (
    INT4_GROUP,
    INT8_GROUP,
    LANES,
    NEURONS,
    Int4Weight,
    PlainIntegerWeight,
)
from engine.kernels.reference import ReferenceBackend
from engine.kv_cache import KVCache
from engine.models.checkpoint import load_checkpoint
from engine.models.weights import tensors_of
from engine.outputs import SampleOutput
from tests.engine.models.tiny import make_tiny
from tests.engine.steps import Chunk, blocks_of, step_inputs

LAYERS, OUT, IN = 3, 48, 128
# A scale in bfloat16 is off by up to this share of itself.
SCALE_ERROR = 2.0**-8
TEXTS = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))[:8]
TEXT_TOKENS, WINDOW = 1536, 512
MODES = [Activation(), Activation(ActivationMode.STOCHASTIC, p=0.75, seed=11), Activation(ActivationMode.RELU)]
QUANTISED = [Quantization.INT8, Quantization.INT4]
SAMPLING = SamplingParams(temperature=0.9, top_p=0.95, seed=5, max_tokens=12, ignore_eos=True, logprobs=1)
every_mode = pytest.mark.parametrize("activation", MODES, ids=[*ActivationMode])
every_quantisation = pytest.mark.parametrize("quantize", QUANTISED)


# What is stored. The layout is read here as its description says, not by the code that wrote it.


def floats(bits: NDArray[Any]) -> NDArray[np.float32]:
    """bfloat16 bits as numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def by_neurons(factors: NDArray[Any], shape: torch.Size, group: int) -> NDArray[np.float32]:
    """The factor at each weight [layers, out, in], from those of 16 neurons for one group after another."""
    _, out, size = shape
    neuron, g = np.arange(out)[:, None], np.arange(size) // group
    return floats(factors)[:, (neuron // NEURONS * (size // group) + g) * NEURONS + neuron % NEURONS]


def in_lanes(values: NDArray[Any], group: int, unit: int) -> NDArray[Any]:
    """[..., in], of which each lies where vector loops look for it, from how they lie: one after another.

    Of n groups left, the largest power of two up to 8 is taken; each has 8 / that many lanes of all 8, and of every
    vector so many units, one behind the other.
    """
    found, at, first = np.empty_like(values), 0, 0
    groups = values.shape[-1] // group
    while first < groups:
        count = next(count for count in (8, 4, 2, 1) if count <= groups - first)
        share = LANES // count
        for vector in range(group // unit // share):
            for g in range(first, first + count):
                for lane in range(share):
                    place = g * group + (vector * share + lane) * unit
                    found[..., place : place + unit] = values[..., at : at + unit]
                    at += unit
        first += count
    return found


def by_rows(factors: NDArray[Any], shape: torch.Size, group: int) -> NDArray[np.float32]:
    """The factor at each weight [layers, out, in], from those of the groups of one neuron after another."""
    return floats(factors).reshape(*shape[:2], -1).repeat(group, -1)


def read_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    stored = quantise_int8(as_array(weight), amx=True)
    steps = by_neurons(stored.scales, weight.shape, INT8_GROUP)
    return torch.from_numpy(stored.values.reshape(weight.shape) * steps), torch.from_numpy(steps)


def read_plain_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    stored = quantise_int8(as_array(weight), amx=False)
    steps = by_rows(stored.scales, weight.shape, INT8_GROUP)
    return torch.from_numpy(in_lanes(stored.values.reshape(weight.shape), INT8_GROUP, 2) * steps), torch.from_numpy(
        steps
    )


def halves_of(values: NDArray[Any], shape: torch.Size) -> NDArray[Any]:
    """[layers, out, in]: a byte has elements i and i + 32 of 64."""
    layers, out, size = shape
    i = np.arange(size)
    halves = values.reshape(layers, out, size // 2)[..., i // 64 * 32 + i % 32]
    return np.where(i % 64 < 32, halves & 15, halves >> 4)


def read_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    stored = quantise_int4(as_array(weight), amx=True)
    assert isinstance(stored, Int4Weight)
    steps, minima = (by_neurons(part, weight.shape, INT4_GROUP) for part in (stored.scales, stored.minima))
    whole = halves_of(stored.values, weight.shape)
    return torch.from_numpy(whole * steps + minima), torch.from_numpy(steps)


def read_plain_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    stored = quantise_int4(as_array(weight), amx=False)
    assert isinstance(stored, PlainIntegerWeight)
    steps, minima = (by_rows(part, weight.shape, INT4_GROUP) for part in (stored.scales, stored.minima))
    whole = in_lanes(halves_of(stored.values, weight.shape), INT4_GROUP, 4)
    return torch.from_numpy(whole * steps + minima), torch.from_numpy(steps)


def read_down(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of [layers, intermediate, hidden]: a group is 64 rows of one column."""
    stored = quantise_down(as_array(weight))
    layers, neurons, hidden = weight.shape
    steps = floats(stored.scales).reshape(layers, neurons // INT8_GROUP, hidden).repeat(INT8_GROUP, 1)
    return torch.from_numpy(stored.values.reshape(weight.shape) * steps), torch.from_numpy(steps)


def read_down_across(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same with the axes of the others."""
    found, steps = read_down(weight.transpose(1, 2).contiguous())
    return found.transpose(1, 2), steps.transpose(1, 2)


# Quantise [layers, out, in] and read it back: the weights, and the step at each.
READERS = {
    "int8": read_int8,
    "plain-int8": read_plain_int8,
    "int4": read_int4,
    "plain-int4": read_plain_int4,
    "down": read_down_across,
}
every_kind = pytest.mark.parametrize("kind", READERS)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Values that hypothesis chooses, in another order and size in each neuron. No model has subnormal ones."""
    number = st.floats(-1, 1, width=32).map(lambda x: x if abs(x) > 1e-6 else 0.0)
    pattern = draw(arrays(np.float32, INT8_GROUP, elements=number))
    layer, neuron, i = np.ogrid[:LAYERS, :OUT, :IN]
    exponents = draw(arrays(np.int8, (LAYERS, OUT, IN // INT4_GROUP), elements=st.integers(-6, 3)))
    sizes = (10.0**exponents).astype(np.float32).repeat(INT4_GROUP, -1)
    return torch.from_numpy(pattern[(i + 7 * neuron + 31 * layer) % INT8_GROUP] * sizes)


@pytest.mark.parametrize("kind", ["int8", "plain-int8", "down"])
@given(weight=weights())
def test_eight_bits_are_off_by_half_a_step_at_most(kind: str, weight: Tensor) -> None:
    found, steps = READERS[kind](weight)

    assert ((found - weight).abs() <= 0.5001 * steps + SCALE_ERROR * weight.abs()).all()
    # The step is the smallest that reaches the group's largest value.
    largest = weight.reshape(LAYERS, OUT, -1, INT8_GROUP).abs().amax(-1).repeat_interleave(INT8_GROUP, -1)
    torch.testing.assert_close(steps, largest / 127, rtol=SCALE_ERROR, atol=0)


@pytest.mark.parametrize("kind", ["int4", "plain-int4"])
@given(weight=weights())
def test_four_bits_are_no_worse_than_sixteen_even_steps_over_the_range(kind: str, weight: Tensor) -> None:
    """Least squares may clip a value to serve the others, so it is the group's error that counts."""
    found, _ = READERS[kind](weight)

    groups = weight.double().reshape(LAYERS, OUT, -1, INT4_GROUP)
    squares = (found.double().reshape(groups.shape) - groups).square().sum(-1)
    low, high = groups.amin(-1), groups.amax(-1)
    half_step = (high - low) / 15 / 2
    # What bfloat16 makes of the minimum moves all values of a group; of the scale, the largest one by 15 steps.
    worst = half_step + SCALE_ERROR * (low.abs() + 30 * half_step)
    assert (squares <= 1.001 * INT4_GROUP * worst.square()).all()


@every_kind
@given(values=arrays(np.float32, (LAYERS, OUT, IN // INT8_GROUP), elements=st.sampled_from([0.0, 1.5, -2.0, 0.3])))
def test_constant_groups_stay_constant_and_zeros_stay_zeros(kind: str, values: NDArray[np.float32]) -> None:
    weight = torch.from_numpy(values.repeat(INT8_GROUP, -1))

    found, _ = READERS[kind](weight)

    torch.testing.assert_close(found, weight, rtol=2 * SCALE_ERROR, atol=0)
    groups = found.reshape(LAYERS, OUT, -1, INT8_GROUP)
    assert (groups == groups[..., :1]).all()


@every_kind
def test_each_value_has_its_own_place(kind: str) -> None:
    """All zeros but one value: it comes back where it was, and everything else as 0."""
    for place in [(0, 0, 0), (0, 0, 33), (0, 17, 64), (1, 15, 95), (1, 31, 127), (2, 47, 126)]:
        weight = torch.zeros(LAYERS, OUT, IN)
        weight[place] = 3.0

        found, _ = READERS[kind](weight)

        assert float(found[place]) == pytest.approx(3.0, rel=2 * SCALE_ERROR)
        assert found.count_nonzero() == 1


@every_kind
@given(weight=weights())
def test_bfloat16_is_quantised_like_the_same_numbers_in_float32(kind: str, weight: Tensor) -> None:
    short = weight.bfloat16()

    for found, expected in zip(READERS[kind](short), READERS[kind](short.float()), strict=True):
        assert torch.equal(found, expected)


@every_kind
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_group_with_a_value_that_is_no_number_does_not_become_one_without(kind: str, value: float) -> None:
    """So that a corrupt checkpoint ends in an error, not in wrong text."""
    weight = torch.rand(LAYERS, OUT, IN) - 0.5
    weight[1, 7, 70] = value

    found, _ = READERS[kind](weight)

    assert not found[1, 7, 70].isfinite()
    assert found[1, 7, :64].isfinite().all()
    assert found[1, 8:].isfinite().all()


# Small models.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_tiny("llama", path)
    return path


def start(model: Path | None, **options: Any) -> LLM:
    settings = {"kv_cache_mib": 64, "allow_untuned_activations": True, "dtype": DType.BFLOAT16, **options}
    return LLM(config=EngineConfig(model=None if model is None else str(model), **settings))


def prompts(count: int, vocab_size: int = 300) -> list[list[int]]:
    return [[(31 * i + 17 * j * j) % vocab_size + 3 for j in range(24 + 3 * i)] for i in range(count)]


def scores(llm: LLM, activation: Activation) -> NDArray[np.float64]:
    """Log-probabilities of all tokens of some texts."""
    return np.concatenate([score.logprobs for score in llm.score(prompts(6), activation)])


@every_mode
@pytest.mark.parametrize(("quantize", "tolerance"), [(Quantization.INT8, 0.05), (Quantization.INT4, 0.5)])
def test_a_small_model_says_nearly_what_it_says_in_float32(
    tiny: Path, quantize: Quantization, tolerance: float, activation: Activation
) -> None:
    """Random weights have nothing in common, so each one's rounding counts: more than in a model that was trained."""
    with start(tiny, dtype=DType.FLOAT32) as llm:
        exact = scores(llm, activation)
    with start(tiny, dtype=DType.FLOAT32, quantize=quantize) as llm:
        found = scores(llm, activation)

    assert 0 < float(np.std(found - exact) / np.std(exact)) < tolerance


@every_mode
@every_quantisation
@torch.inference_mode()
def test_what_is_computed_is_the_model_of_the_rounded_weights(
    tiny: Path, quantize: Quantization, activation: Activation
) -> None:
    """That token rows become integers adds next to nothing."""
    checkpoint, rounded = (load_checkpoint(str(tiny), dtype=torch.float32, progress=print) for _ in range(2))
    stacked, read = rounded.weights.stacked, READERS[quantize]
    for name in ("qkv", "o", "gate", "up"):
        setattr(stacked, name, read(getattr(stacked, name))[0])
    stacked.down = read_down(stacked.down)[0]
    rounded.weights.lm_head = read_int8(rounded.weights.lm_head[None])[0][0]
    config, tokens = checkpoint.config, prompts(1)[0]
    step = step_inputs([Chunk(tokens, 0, blocks_of(0, len(tokens)), activation)])

    def new_cache() -> KVCache:
        return KVCache.allocate(config, 4, torch.float32)

    backends = (
        CpuBackend(config, checkpoint.weights, new_cache(), quantization=quantize),
        ReferenceBackend(config, rounded.weights, new_cache()),
    )
    found, expected = (backend.logits(backend.forward(step)) for backend in backends)

    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


@pytest.mark.skipif(not has_amx(), reason="the processor has no AMX")
@every_mode
@every_quantisation
def test_tiles_and_vector_loops_agree_but_for_the_rounding_of_sums(
    tiny: Path, quantize: Quantization, activation: Activation
) -> None:
    with start(tiny, quantize=quantize) as llm:
        tiles = scores(llm, activation)
    with start(tiny, quantize=quantize, kernels=KernelSet.VECTOR) as llm:
        assert "vector" in llm.info.kernels["linear"]
        vectors = scores(llm, activation)

    np.testing.assert_allclose(tiles, vectors, rtol=0, atol=1e-3)


def alone_and_in_a_batch(llm: LLM, vocab_size: int) -> tuple[list[SampleOutput], list[SampleOutput]]:
    """One request in each mode by itself, and the same among six others that run in all modes at once."""
    engine = llm._engine
    assert engine is not None
    texts = prompts(9, vocab_size)
    alone = [llm.generate(texts[i], SAMPLING, mode)[0].samples[0] for i, mode in enumerate(MODES)]
    for i, text in enumerate(texts):
        sampling = SAMPLING if i < len(MODES) else replace(SAMPLING, seed=100 + i, temperature=1.1)
        engine.add(engine.check(f"r{i}", text, sampling, MODES[i % len(MODES)]))
    assert engine.num_waiting == len(texts)
    batched: dict[str, SampleOutput] = {}
    while engine.has_work:
        for output in engine.step():
            for piece in output.samples:
                if output.request_id in batched:
                    batched[output.request_id].extend(piece)
                else:
                    batched[output.request_id] = piece
    return alone, [batched[f"r{i}"] for i in range(len(MODES))]


@pytest.mark.parametrize("kernels", [KernelSet.AUTO, KernelSet.VECTOR])
@every_quantisation
def test_same_seed_same_tokens_alone_and_in_a_batch(tiny: Path, quantize: Quantization, kernels: KernelSet) -> None:
    with start(tiny, quantize=quantize, kernels=kernels) as llm:
        alone, batched = alone_and_in_a_batch(llm, 300)

    assert alone == batched


def test_each_quantisation_has_a_digest_and_a_size_of_its_own(tiny: Path) -> None:
    infos = []
    for quantize in Quantization:
        with start(tiny, quantize=quantize, dtype=DType.FLOAT32) as llm:
            infos.append(llm.info)

    assert [info.quantization for info in infos] == [*Quantization]
    assert len({info.weights_digest for info in infos}) == len(Quantization)
    assert all(more.weight_bytes > less.weight_bytes for more, less in pairwise(infos))
    assert infos[0].weight_bytes == 4 * infos[0].num_parameters
    with start(tiny, quantize=Quantization.INT8, dtype=DType.FLOAT32) as llm:
        assert llm.info.weights_digest == infos[1].weights_digest


@every_quantisation
def test_weights_in_float_are_let_go_of(tiny: Path, quantize: Quantization) -> None:
    """Their memory, that is: a view of no elements would keep all of it."""
    checkpoint = load_checkpoint(str(tiny), dtype=torch.bfloat16, progress=lambda line: None)
    weights, config = checkpoint.weights, checkpoint.config
    before = sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(weights))

    backend = CpuBackend(config, weights, KVCache.allocate(config, 4, torch.bfloat16), quantization=quantize)

    left = sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(weights))
    assert left < before - 2 * config.num_layers * 3 * config.hidden_size * config.intermediate_size
    assert left < backend.weight_bytes < before


def test_the_reference_kernels_know_no_quantised_weights(tiny: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"quantize must be 'none' .*reference.*, got 'int8'"):
        start(tiny, quantize=Quantization.INT8, kernels=KernelSet.REFERENCE)


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ({"hidden_size": 96, "num_attention_heads": 4, "head_dim": 16}, "hidden_size 96 is no multiple of 64"),
        ({"intermediate_size": 160}, "intermediate_size 160 is no multiple of 64"),
    ],
)
@every_quantisation
def test_widths_that_do_not_hold_whole_groups_are_refused(
    tmp_path: Path, quantize: Quantization, shape: dict[str, Any], problem: str
) -> None:
    make_tiny("llama", tmp_path, **shape)
    with pytest.raises(UnsupportedArchitecture, match=f"{problem}, which the {quantize} weights need"):
        start(tmp_path, quantize=quantize)
    with start(tmp_path) as llm:
        assert llm.info.quantization == Quantization.NONE


# The default model.


def perplexity(llm: LLM, activation: Activation) -> float:
    """Of the beginnings of some pages of the documentation, in windows."""
    windows = []
    for text in TEXTS:
        tokens = llm.tokenizer.encode(text.read_text(encoding="utf-8"))[:TEXT_TOKENS]
        windows += [tokens[first : first + WINDOW] for first in range(0, len(tokens), WINDOW)]
    assert sum(map(len, windows)) > 4 * TEXT_TOKENS
    logprobs = [value for score in llm.score(windows, activation) for value in score.logprobs]
    return math.exp(-math.fsum(logprobs) / len(logprobs))


@pytest.fixture(scope="module")
def as_it_is() -> float:
    with start(None) as llm:
        return perplexity(llm, Activation())


@pytest.fixture(scope="module", params=QUANTISED)
def quantised(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with start(None, quantize=request.param) as llm:
        yield llm


@pytest.mark.slow
def test_perplexity_of_the_default_model_hardly_rises(quantised: LLM, as_it_is: float) -> None:
    # Several pages together: single ones of 1,536 tokens differ from the mean by a third of a per cent.
    allowed = {"int8": 1.005, "int4": 1.03}[quantised.info.quantization]

    assert perplexity(quantised, Activation()) < allowed * as_it_is


@pytest.mark.slow
def test_the_default_model_says_the_same_alone_and_in_a_batch(quantised: LLM) -> None:
    alone, batched = alone_and_in_a_batch(quantised, 40_000)

    assert alone == batched
