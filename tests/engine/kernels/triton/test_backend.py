"""The decoder on Triton's kernels against the reference, and each row's bits against those it has in any other step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.activation import Activation, ActivationMode
from engine.kernels.backend import Backend
from engine.kernels.reference import ReferenceBackend
from engine.kernels.triton.backend import StepLimits, TritonBackend
from engine.kv_cache import KVCache
from engine.models import Checkpoint, load_checkpoint
from engine.models.weights import move_weights
from engine.step import StepInputs
from tests.engine.kernels.triton.devices import DEVICE
from tests.engine.models.tiny import VOCAB_SIZE, make_tiny
from tests.engine.steps import SILU, Chunk, blocks_of, step_inputs

NUM_BLOCKS = 8
LIMITS = StepLimits(rows=24, sequences=4, tokens=64)
STOCHASTIC = Activation(ActivationMode.STOCHASTIC, p=0.6, seed=-9)
RELU = Activation(ActivationMode.RELU)


def load_tiny(family: str, folder: pytest.TempPathFactory, dtype: torch.dtype, **changes: int) -> Checkpoint:
    path = folder.mktemp(family)
    make_tiny(family, path, **changes)
    return load_checkpoint(str(path), dtype=dtype, progress=lambda line: None)


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.inference_mode():
        yield


def empty_cache(checkpoint: Checkpoint, device: torch.device) -> KVCache:
    """A cache whose garbage is NaN."""
    cache = KVCache.allocate(checkpoint.config, NUM_BLOCKS, checkpoint.weights.embedding.dtype, device)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    return cache


def reference(checkpoint: Checkpoint) -> Backend:
    return ReferenceBackend(checkpoint.config, checkpoint.weights, empty_cache(checkpoint, torch.device("cpu")))


def on_triton(checkpoint: Checkpoint) -> TritonBackend:
    move_weights(checkpoint.weights, DEVICE)
    return TritonBackend(checkpoint.config, checkpoint.weights, empty_cache(checkpoint, DEVICE), limits=LIMITS)


def prompt(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


def logits_of(decoder: Backend, step: StepInputs) -> Tensor:
    return decoder.logits(decoder.forward(step)[step.sample_rows]).float().cpu().clone()


def logits_in_steps(
    decoder: Backend, tokens: Sequence[int], cuts: Sequence[int], activation: Activation = SILU, *, sparse: bool = False
) -> Tensor:
    """Logits of every token, computed `cuts` tokens at a time."""
    logits, start = [], 0
    for count in cuts:
        chunk = Chunk(tokens[start : start + count], start, blocks_of(0, len(tokens)), activation)
        logits.append(logits_of(decoder, step_inputs([chunk], sparse=sparse)))
        start += count
    return torch.cat(logits)


# Between them: grouped heads, biases, norms of heads, windows, layers without rotation, tied embeddings.
@pytest.mark.parametrize("family", ["llama-bias", "qwen3", "smollm3-swa"])
def test_logits_of_every_family_equal_the_reference(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint, tokens = load_tiny(family, tmp_path_factory, torch.float32), prompt(20)
    expected = logits_in_steps(reference(checkpoint), tokens, [20], STOCHASTIC)

    found = logits_in_steps(on_triton(checkpoint), tokens, [19, 1], STOCHASTIC)

    assert expected.std() > 0.1  # else any small logits would do
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_bfloat16_is_as_near_to_float32_as_its_rounding_allows(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The kernels err no more than plain PyTorch in bfloat16 does."""
    exact, rounded = (load_tiny("llama", tmp_path_factory, dtype) for dtype in (torch.float32, torch.bfloat16))
    tokens = prompt(20)
    expected = logits_in_steps(reference(exact), tokens, [20])
    plain = logits_in_steps(reference(rounded), tokens, [20])

    kernels = logits_in_steps(on_triton(rounded), tokens, [20])

    error, allowed = (float((found - expected).std() / expected.std()) for found in (kernels, plain))
    assert error < 1.2 * allowed < 0.1


@dataclass(frozen=True)
class Member:
    """A sequence of a mixed step: all but its last `count` tokens are in the cache already."""

    length: int
    count: int
    activation: Activation


MEMBERS = [Member(18, 3, STOCHASTIC), Member(9, 1, SILU), Member(5, 5, RELU)]
DECODING = [Member(18, 1, STOCHASTIC), Member(9, 1, SILU), Member(5, 1, RELU)]  # three rows, padded to four


def together(decoder: Backend, members: Sequence[Member], *, sparse: bool) -> list[Tensor]:
    """Logits of each member's last tokens, all in one step."""
    chunks = []
    for index, member in enumerate(members):
        tokens, start = prompt(member.length, index), member.length - member.count
        blocks = blocks_of(index, 18, len(members))
        if start:
            decoder.forward(step_inputs([Chunk(tokens[:start], 0, blocks, member.activation)], sparse=sparse))
        chunks.append(Chunk(tokens[start:], start, blocks, member.activation))
    logits = logits_of(decoder, step_inputs(chunks, sparse=sparse))
    return [*torch.split(logits, [member.count for member in members])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("members", [MEMBERS, DECODING], ids=["mixed", "decoding"])
def test_a_sequence_is_bit_identical_alone_and_in_a_step(
    members: list[Member], dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whether zeros are skipped or not, whether the prompt comes at once or in pieces."""
    checkpoint = load_tiny("qwen3", tmp_path_factory, dtype, num_hidden_layers=2)
    found = together(on_triton(checkpoint), members, sparse=True)

    for index, (member, logits) in enumerate(zip(members, found, strict=True)):
        cuts = [member.length - 2, 1, 1] if index else [member.length]
        alone = logits_in_steps(on_triton(checkpoint), prompt(member.length, index), cuts, member.activation)
        assert torch.equal(logits, alone[-member.count :])


def test_zeros_are_counted_as_the_reference_does(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Padded rows among them."""
    checkpoint = load_tiny("llama", tmp_path_factory, torch.float32, num_hidden_layers=2)
    expected = reference(checkpoint)
    together(expected, DECODING, sparse=False)

    found = on_triton(checkpoint)
    together(found, DECODING, sparse=True)

    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    (zeros, elements), (expected_zeros, expected_elements) = found.sparsity.by_mode(), expected.sparsity.by_mode()
    assert elements == expected_elements
    for mode in ActivationMode:
        # Beside 0 lie values that another order of summation moves across it.
        assert zeros[mode] == pytest.approx(expected_zeros[mode], abs=2)
    assert zeros[ActivationMode.RELU][0] > 0.3 * elements[ActivationMode.RELU][0]
    assert found.row_zeros == pytest.approx(expected.row_zeros, abs=2)


def test_logits_of_a_decoding_step_come_with_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = load_tiny("llama", tmp_path_factory, torch.float32, num_hidden_layers=1)
    decoder = on_triton(checkpoint)
    chunks = [Chunk([7 + line], 0, [line]) for line in range(3)]

    hidden = decoder.forward(step_inputs(chunks))
    at_once = decoder.logits(hidden).clone()
    some = decoder.logits(hidden[[2, 0]])

    assert torch.equal(some, at_once[[2, 0]])


def test_every_decoding_step_can_be_prepared(tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = load_tiny("llama", tmp_path_factory, torch.float32, num_hidden_layers=1)
    decoder = on_triton(checkpoint)
    step = step_inputs([Chunk([7], 0, [0])])
    expected = decoder.logits(decoder.forward(step)).clone()

    decoder.prepare(checkpoint.support.positive_branch, may_skip=True)

    assert torch.equal(decoder.logits(decoder.forward(step)), expected)
    assert decoder.describe()["decoding"].endswith("batches of 1, 2, 4")
