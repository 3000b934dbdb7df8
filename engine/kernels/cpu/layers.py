"""All layers of a step in one compiled call, without Python or allocation between them.

A layer is five parallel regions: queries, keys and values; attention; its output; gate and up; down. What lies between,
norms and the layout of rows for products, is done by the calling thread while there are few rows. The work of a region
is cut by neurons, never along a sum that could then depend on the number of threads.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.extending import overload
from numpy.typing import NDArray

from engine.kernels.cpu.attention import paged_attention, rotate_and_cache
from engine.kernels.cpu.attention_tiles import list_pieces, tile_attention
from engine.kernels.cpu.feed_forward import feed_forward
from engine.kernels.cpu.linear import multiply, prepare
from engine.kernels.cpu.math import widen
from engine.kernels.cpu.options import OPTIONS
from engine.kernels.cpu.product import is_kind
from engine.kernels.cpu.quantised import Int4Weight, Int8Down, Int8Weight, PlainIntegerWeight

Array = NDArray[Any]


class LayerArrays(NamedTuple):
    """Weights of all layers, each stacked along the first axis; [layers, 0] where a model has none.

    Linear weights are flat behind the layer, [layers, out * in], float32 or bfloat16 bits, or quantised. Norms and
    biases are float32.
    """

    input_norm: Array  # [layers, hidden]
    qkv: Array
    qkv_bias: Array
    q_norm: Array
    k_norm: Array
    o: Array
    o_bias: Array
    post_norm: Array
    gate: Array
    up: Array
    down: Array
    window: Array  # int64 [layers], 0 for none
    rotated: Array  # bool [layers]


class StepRows(NamedTuple):
    """What a step says about its rows; see `StepInputs` and `ActivationRows`."""

    cos: Array  # float32 [rows, head_dim / 2]
    sin: Array
    tokens: Array
    slots: Array
    sequence: Array
    tables: Array
    positions: Array
    thresholds: Array
    keys: Array
    modes: Array


def of_layer(weights: Any, layer: Any) -> Any:
    """One layer of a stacked weight in any format, in kernels and outside."""
    return type(weights)(*(part[layer] for part in weights)) if isinstance(weights, tuple) else weights[layer]


@overload(of_layer)
def _of_layer(weights, layer):  # type: ignore[no-untyped-def]
    if is_kind(weights, Int8Weight):
        return lambda weights, layer: Int8Weight(weights.values[layer], weights.scales[layer])
    if is_kind(weights, Int4Weight):
        return lambda weights, layer: Int4Weight(weights.values[layer], weights.scales[layer], weights.minima[layer])
    if is_kind(weights, PlainIntegerWeight):
        return lambda weights, layer: PlainIntegerWeight(
            weights.values[layer], weights.scales[layer], weights.minima[layer]
        )
    if is_kind(weights, Int8Down):
        return lambda weights, layer: Int8Down(weights.values[layer], weights.scales[layer])
    return lambda weights, layer: weights[layer]


@njit(**OPTIONS)
def project(hidden, norm, eps, inputs, linear, config, out, threads, scratch):  # type: ignore[no-untyped-def]
    """out = RMSNorm of hidden rows, times `linear`: logits.

    Args:
        hidden: float32 [rows, hidden].
        norm: float32 [hidden], weight of the norm.
        eps: Of the norm, float32.
        inputs: Where rows are packed for products.
        linear: [width * hidden].
        config: Tile shapes, None without AMX.
        out: float32 [rows, width].
        threads: How many there are.
        scratch: `Scratch.thread`.
    """
    prepare(hidden, norm, eps, inputs, linear)
    none = np.empty(0, np.float32)
    multiply(inputs, hidden.shape[1], config, linear, none, out, threads, scratch, False)


@njit(**OPTIONS)
def run_layers(  # type: ignore[no-untyped-def]
    x,
    embedding,
    weights,
    step,
    skip,
    keys,
    values,
    eps,
    scale,
    identity,
    inputs,
    inputs_o,
    config,
    down_config,
    attention_config,
    threads,
    scratch,
    zeros,
    kept,
    totals,
):
    """All decoder layers.

    Args:
        x: Out, float32 [rows, hidden].
        embedding: [vocabulary, hidden], float32 or bfloat16 bits.
        weights: `LayerArrays`.
        step: `StepRows`.
        skip: See `feed_forward`.
        keys, values: The cache of all layers.
        eps: Of norms, float32.
        scale: Of queries, float32.
        identity: Positive branch.
        inputs: Where rows of `hidden` are packed for products.
        inputs_o: Likewise for the attention's output.
        config: Tile shapes of products, None without AMX.
        down_config: Of `multiply_down`.
        attention_config: Of `tile_attention`, whose layout the cache then has, or None.
        threads: How many there are.
        scratch: `Scratch`.
        zeros: Out, int64 [layers, rows], zeros of each row's activations.
        kept: Out, int64 [layers, rows], negative values that SILU kept, of stochastic rows.
        totals: Out, int64 [1 + rows]: neurons whose weights in `up` and `down` were read, then the zeros of each row,
            over all layers.
    """
    rows, hidden = x.shape
    totals[:] = 0
    for r in range(rows):
        for k in range(hidden):
            x[r, k] = widen(embedding[step.tokens[r], k])
    none = np.empty(0, np.float32)
    pieces = np.empty(rows + 1, np.int64)
    num_pieces = list_pieces(step.sequence, step.positions, scratch.queries.shape[1] // keys.shape[2], pieces)
    for layer in range(weights.input_norm.shape[0]):
        qkv, o = of_layer(weights.qkv, layer), of_layer(weights.o, layer)
        prepare(x, weights.input_norm[layer], eps, inputs, qkv)
        multiply(inputs, hidden, config, qkv, weights.qkv_bias[layer], scratch.qkv, threads, scratch.thread, False)
        angles = step.cos.shape[1] if weights.rotated[layer] else 0
        rotate_and_cache(
            scratch.qkv,
            step.cos[:, :angles],
            step.sin[:, :angles],
            weights.q_norm[layer],
            weights.k_norm[layer],
            eps,
            scale,
            step.slots,
            attention_config is not None,
            scratch.queries,
            keys[layer],
            values[layer],
        )
        rows_and_cache = (
            scratch.queries,
            keys[layer],
            values[layer],
            step.tables,
            step.sequence,
            step.positions,
            weights.window[layer],
        )
        if attention_config is not None:
            tile_attention(*rows_and_cache, pieces, num_pieces, attention_config, scratch.attended)
        else:
            paged_attention(*rows_and_cache, threads, scratch.attended)
        prepare(scratch.attended, none, eps, inputs_o, o)
        width = scratch.attended.shape[1]
        multiply(inputs_o, width, config, o, weights.o_bias[layer], x, threads, scratch.thread, True)
        feed_forward(
            x,
            weights.post_norm[layer],
            eps,
            inputs,
            config,
            down_config,
            skip,
            of_layer(weights.gate, layer),
            of_layer(weights.up, layer),
            of_layer(weights.down, layer),
            step,
            layer,
            identity,
            threads,
            scratch,
            x,
        )
        for r in range(rows):
            zeros[layer, r] = scratch.zeros[:, r].sum()
            kept[layer, r] = scratch.kept[:, r].sum()
            totals[1 + r] += zeros[layer, r]
        totals[0] += scratch.neurons.sum()
