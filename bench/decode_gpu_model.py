"""Decoders of real models' shapes with random weights, made on the device, and sequences in the middle of decoding."""

import math
import statistics
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch
from torch import Tensor

from engine.activation import Activation, ActivationSupport, PositiveBranch
from engine.kv_cache import BLOCK_SIZE, blocks_for
from engine.models.checkpoint import Checkpoint, SourceFormat
from engine.models.config import DecoderConfig, DecoderWeights, LayerWeights
from engine.models.rope import inverse_frequencies
from engine.models.weights import tensors_of
from engine.quality import MeasuredQuality
from engine.request import Request, Sequence
from engine.sampling_params import SamplingParams
from engine.scheduler import ScheduledSequence, StepPlan

# Standard deviation of what a layer adds to the residual stream, whose values are +1 and -1 at first: so little that
# the share of negative gate values is the same in all layers.
UPDATE = 0.02


def llama(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, *, tied: bool
) -> DecoderConfig:
    """A decoder of the Llama family."""
    return DecoderConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        max_position=4096,
        tie_embeddings=tied,
        sliding_window=(None,) * layers,
        use_rope=(True,) * layers,
    )


SHAPES = {
    "llama-1b": llama(16, 2048, 8192, 32, 8, 128_256, tied=True),  # Llama-3.2-1B
    "llama-7b": llama(32, 4096, 11_008, 32, 32, 32_000, tied=False),  # Llama-2-7B
    "tiny": llama(2, 64, 192, 4, 2, 320, tied=True),  # for a look at the benchmark itself
}


def random_weights(config: DecoderConfig, zeros: float, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Weights with which every layer's gate values are normal, a wanted share of them negative.

    Channel 0 of the residual stream is 1 throughout: all embeddings have it, and no layer adds to it. So it can carry
    a bias, which moves all gate values down.

    Args:
        config: The shape.
        zeros: Share of negative gate values, in (0, 1).
        dtype: Of the weights.
        device: Where.
    """
    generator = torch.Generator(device).manual_seed(0)
    layers, hidden, intermediate = config.num_layers, config.hidden_size, config.intermediate_size
    qkv = config.q_size + 2 * config.kv_size

    def normal(*shape: int, std: float) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=generator)

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    gate = normal(layers, intermediate, hidden, std=hidden**-0.5)
    gate[:, :, 0] = -statistics.NormalDist().inv_cdf(zeros)
    o = normal(layers, hidden, config.q_size, std=UPDATE * config.q_size**-0.5)
    o[:, 0] = 0
    down = normal(layers, intermediate, hidden, std=UPDATE * intermediate**-0.5)
    down[:, :, 0] = 0
    stacked = LayerWeights(
        input_norm=ones(layers, hidden),
        qkv=normal(layers, qkv, hidden, std=hidden**-0.5),
        qkv_bias=None,
        q_norm=None,
        k_norm=None,
        o=o,
        o_bias=None,
        post_norm=ones(layers, hidden),
        gate=gate,
        up=normal(layers, intermediate, hidden, std=hidden**-0.5),
        down=down,
    )
    embedding = normal(config.vocab_size, hidden, std=1).sign()
    embedding[:, 0] = 1
    lm_head = embedding if config.tie_embeddings else normal(config.vocab_size, hidden, std=hidden**-0.5)
    inv_freq = inverse_frequencies(config.head_dim, config.rope_theta)
    return DecoderWeights(embedding, stacked, ones(hidden), lm_head, inv_freq)


def random_checkpoint(
    name: str, zeros: float, dtype: torch.dtype, device: torch.device, config: DecoderConfig | None = None
) -> Checkpoint:
    """A model of `SHAPES`, as if it had been loaded; `config` replaces the shape."""
    config = config or SHAPES[name]
    weights = random_weights(config, zeros, dtype, device)
    return Checkpoint(
        name=name,
        path=Path(name),
        source_format=SourceFormat.HUGGING_FACE,
        tokenizer_source=Path(name),
        config=config,
        weights=weights,
        adapter=None,
        support=ActivationSupport(min_p=0.0, positive_branch=PositiveBranch.SILU),
        quality=MeasuredQuality.from_metadata({}),
        eos_token_ids=(),
        num_parameters=sum(tensor.numel() for tensor in tensors_of(weights)),
    )


def num_parameters(config: DecoderConfig) -> int:
    """Tied embeddings count once. Allocates nothing."""
    layer = config.hidden_size * (2 * config.q_size + 2 * config.kv_size + 3 * config.intermediate_size + 2)
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    return config.num_layers * layer + embeddings + config.hidden_size


def step_bytes(config: DecoderConfig, batch: int, context: int, itemsize: int, idle: float = 0.0) -> int:
    """Bytes that a decoding step has to read: weights once, keys and values of every sequence.

    Args:
        config: The shape.
        batch: Sequences.
        context: Tokens of each.
        itemsize: Bytes of a number.
        idle: Share of neurons whose rows of `up` and `down` are not read.
    """
    embedding = config.vocab_size * config.hidden_size  # of which a step reads a few rows, unless it is `lm_head`, too
    weights = num_parameters(config) - (0 if config.tie_embeddings else embedding)
    skipped = idle * 2 * config.num_layers * config.hidden_size * config.intermediate_size
    cached = 2 * config.num_layers * config.kv_size * context * batch
    return math.ceil((weights - skipped + cached) * itemsize)


def start_sequences(
    config: DecoderConfig, batch: int, context: int, steps: int, activation: Activation
) -> list[Sequence]:
    """Sequences of `context` tokens whose keys and values count as cached, with blocks for `steps` more.

    Sequence i is the same, and has the same blocks, in a batch of any size.
    """
    blocks = blocks_for(context + steps)
    sequences = []
    for number in range(batch):
        tokens = [(31 * number + 17 * place) % config.vocab_size for place in range(context)]
        sampling = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, seed=number)
        request = Request.create(str(number), tokens, sampling, activation.with_seed(number), blocks * BLOCK_SIZE)
        sequence = Sequence(request, 0, end_token_ids=())
        sequence.block_ids = [*range(number * blocks, (number + 1) * blocks)]
        sequences.append(sequence)
    return sequences


def decoding_plan(sequences: SequenceOf[Sequence]) -> StepPlan:
    """The next token of every sequence."""
    return StepPlan(tuple(ScheduledSequence(one, len(one.token_ids) - 1, 1, samples=True) for one in sequences))
