"""From a checkpoint's tensors to the fused, neuron-major weights of the engine.

Loaders differ in where tensors come from, not in where they go: each is a `TensorSource` that speaks the names of
Hugging Face's Llama, and `build_weights` copies from any of them, tensor by tensor.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

import torch
from torch import Tensor

from engine.errors import ModelLoadError
from engine.models.config import DecoderConfig, DecoderWeights, LayerWeights

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

LOADERS: Final = 2  # layers at a time: the work is NumPy's and torch's, which leave Python to others meanwhile


class TensorSource(Protocol):
    """A checkpoint's tensors under the names of Hugging Face's Llama (`model.layers.0.self_attn.q_proj.weight`)."""

    @property
    def names(self) -> frozenset[str]:
        """All tensors; those without a Hugging Face name under the name they are stored by."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor; linear weights are (out, in)."""

    def label(self, name: str) -> str:
        """The tensor for error messages: the name it is stored by and its file."""

    def copy_into(self, name: str, destination: Tensor) -> None:
        """Copy the tensor, converted to the type of `destination`, which has its shape and any strides.

        Several threads may do so at once.
        """


def build_weights(config: DecoderConfig, source: TensorSource, inv_freq: Tensor, dtype: torch.dtype) -> DecoderWeights:
    """Copy every tensor to its place; beside the result no more is in memory than `LOADERS` tensors are made from.

    Args:
        config: The decoder's shape.
        source: The checkpoint.
        inv_freq: float32 [head_dim / 2].
        dtype: Type of the weights.

    Returns:
        The weights. `lm_head` is the embedding's own tensor if the embeddings are tied, unless the checkpoint holds
        an output matrix of other values, which then counts (as in transformers).

    Raises:
        ModelLoadError: A tensor is missing, unknown or has another shape than the configuration says.
    """
    _check(config, source)
    embedding = _load(source, EMBEDDING, (config.vocab_size, config.hidden_size), dtype)
    stacked = _allocate_layers(config, dtype)
    final_norm = _load(source, FINAL_NORM, (config.hidden_size,), dtype)
    lm_head = embedding
    if LM_HEAD in source.names:
        separate = _load(source, LM_HEAD, (config.vocab_size, config.hidden_size), dtype)
        if not (config.tie_embeddings and torch.equal(separate, embedding)):
            lm_head = separate
    weights = DecoderWeights(embedding, stacked, final_norm, lm_head, inv_freq)
    inference = torch.is_inference_mode_enabled()  # each thread has its own mode, and tensors of one refuse the other

    def load(index: int) -> None:
        with torch.inference_mode(inference):
            _load_layer(config, source, f"model.layers.{index}", layers[index])

    layers = weights.layers
    with ThreadPoolExecutor(LOADERS) as pool:
        # A few at a time: a process that is told to end waits for all that was given to the pool.
        for first in range(0, len(layers), LOADERS):
            list(pool.map(load, range(first, min(first + LOADERS, len(layers)))))
    return weights


def tensors_of(weights: DecoderWeights) -> Iterator[Tensor]:
    """Every parameter once: tied embeddings count once, the rotary frequencies are no parameters."""
    yield weights.embedding
    parts = (getattr(weights.stacked, name) for name in LayerWeights.__slots__)
    yield from (part for part in parts if part is not None)
    yield weights.final_norm
    if weights.lm_head is not weights.embedding:
        yield weights.lm_head


def move_weights(weights: DecoderWeights, device: torch.device) -> None:
    """Move every parameter to a device, one at a time, letting go of each; tied embeddings stay one tensor."""
    tied = weights.lm_head is weights.embedding
    weights.embedding = weights.embedding.to(device)
    weights.lm_head = weights.embedding if tied else weights.lm_head.to(device)
    weights.final_norm = weights.final_norm.to(device)
    for name in LayerWeights.__slots__:
        part = getattr(weights.stacked, name)
        if part is not None:
            setattr(weights.stacked, name, part.to(device))


def _allocate_layers(config: DecoderConfig, dtype: torch.dtype) -> LayerWeights:
    hidden, intermediate, qkv_size = config.hidden_size, config.intermediate_size, config.q_size + 2 * config.kv_size

    def stack(*shape: int) -> Tensor:
        return torch.empty(config.num_layers, *shape, dtype=dtype)

    return LayerWeights(
        input_norm=stack(hidden),
        qkv=stack(qkv_size, hidden),
        qkv_bias=stack(qkv_size) if config.qkv_bias else None,
        q_norm=stack(config.head_dim) if config.qk_norm else None,
        k_norm=stack(config.head_dim) if config.qk_norm else None,
        o=stack(hidden, config.q_size),
        o_bias=stack(hidden) if config.o_bias else None,
        post_norm=stack(hidden),
        gate=stack(intermediate, hidden),
        up=stack(intermediate, hidden),
        down=stack(intermediate, hidden),
    )


def _load_layer(config: DecoderConfig, source: TensorSource, prefix: str, layer: LayerWeights) -> None:
    def load(name: str, destination: Tensor | None) -> None:
        if destination is not None:
            source.copy_into(f"{prefix}.{name}", destination)

    start = 0
    for part, size in (("q", config.q_size), ("k", config.kv_size), ("v", config.kv_size)):
        load(f"self_attn.{part}_proj.weight", layer.qkv[start : start + size])
        if layer.qkv_bias is not None:
            load(f"self_attn.{part}_proj.bias", layer.qkv_bias[start : start + size])
        start += size
    load("input_layernorm.weight", layer.input_norm)
    load("self_attn.q_norm.weight", layer.q_norm)
    load("self_attn.k_norm.weight", layer.k_norm)
    load("self_attn.o_proj.weight", layer.o)
    load("self_attn.o_proj.bias", layer.o_bias)
    load("post_attention_layernorm.weight", layer.post_norm)
    load("mlp.gate_proj.weight", layer.gate)
    load("mlp.up_proj.weight", layer.up)
    load("mlp.down_proj.weight", layer.down.T)


def _load(source: TensorSource, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    source.copy_into(name, tensor)
    return tensor


def _check(config: DecoderConfig, source: TensorSource) -> None:
    """Everything that can be wrong with a checkpoint's tensors is found before the first byte is copied."""
    known = set()
    for name, shape in _expected(config):
        if name not in source.names:
            raise ModelLoadError(f"missing {source.label(name)}")
        if source.shape(name) != shape:
            found = list(source.shape(name))
            raise ModelLoadError(f"{source.label(name)} has shape {found}, the configuration says {list(shape)}")
        known.add(name)
    if config.tie_embeddings and LM_HEAD in source.names:
        if source.shape(LM_HEAD) != source.shape(EMBEDDING):
            raise ModelLoadError(f"{source.label(LM_HEAD)} has another shape than the embeddings it is tied to")
        known.add(LM_HEAD)
    # An unknown tensor means a layer we would leave out: wrong text instead of an error. Old checkpoints store the
    # rotary frequencies, which follow from the configuration.
    unknown = sorted(name for name in source.names - known if not name.endswith(".rotary_emb.inv_freq"))
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise ModelLoadError(f"{source.label(unknown[0])}{more} has no place in {config.architecture}")


def _expected(config: DecoderConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, intermediate, q_size, kv_size = config.hidden_size, config.intermediate_size, config.q_size, config.kv_size
    yield EMBEDDING, (config.vocab_size, hidden)
    yield FINAL_NORM, (hidden,)
    if not config.tie_embeddings:
        yield LM_HEAD, (config.vocab_size, hidden)
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        attention = f"{layer}.self_attn"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        for part, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            yield f"{attention}.{part}_proj.weight", (size, hidden)
            if config.qkv_bias:
                yield f"{attention}.{part}_proj.bias", (size,)
        yield f"{attention}.o_proj.weight", (hidden, q_size)
        if config.o_bias:
            yield f"{attention}.o_proj.bias", (hidden,)
        if config.qk_norm:
            yield f"{attention}.q_norm.weight", (config.head_dim,)
            yield f"{attention}.k_norm.weight", (config.head_dim,)
        yield f"{layer}.mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{layer}.mlp.up_proj.weight", (intermediate, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, intermediate)
