"""All layers of a step in one compiled call, without Python or allocation between them.

A layer is ten turns of the team: rows laid out and multiplied for queries, keys and values; rotation; attention; its
output, laid out and multiplied; and those of the feed-forward. The work of a turn is cut by rows, heads or neurons,
never along a sum that could then depend on the number of threads.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.extending import overload
from numpy.typing import NDArray

from engine.kernels.cpu.attention import paged_attention, rotate_and_cache
from engine.kernels.cpu.attention_tiles import list_pieces, tile_attention
from engine.kernels.cpu.feed_forward import TURNS as FEED_FORWARD_TURNS
from engine.kernels.cpu.feed_forward import feed_forward_turn
from engine.kernels.cpu.linear import multiply, prepare
from engine.kernels.cpu.math import widen
from engine.kernels.cpu.options import INNER, OPTIONS
from engine.kernels.cpu.product import is_kind
from engine.kernels.cpu.quantised import Int4Weight, Int8Down, Int8Weight, PlainIntegerWeight
from engine.kernels.cpu.separate import call_separately
from engine.kernels.cpu.team import finish, launch, next_share

Array = NDArray[Any]

_FEED_FORWARD = 6  # its first turn
_TURNS = _FEED_FORWARD + FEED_FORWARD_TURNS


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


@njit(**INNER)
def _project_thread(thread, hidden, norm, eps, inputs, linear, config, out, scratch):  # type: ignore[no-untyped-def]
    shares, none = scratch.progress.shape[0], np.empty(0, np.float32)
    for turn in range(2):
        share = next_share(scratch.progress, turn, thread)
        while share >= 0:
            if turn == 0:
                call_separately(prepare, (share, shares, hidden, norm, eps, inputs, linear))
            else:
                size, memory = hidden.shape[1], scratch.thread[share]
                call_separately(multiply, (share, shares, inputs, size, config, linear, none, out, memory, False))
            finish(scratch.progress, turn, share)
            share = next_share(scratch.progress, turn, thread)


@njit(**OPTIONS)
def project(hidden, norm, eps, inputs, linear, config, out, scratch):  # type: ignore[no-untyped-def]
    """out = RMSNorm of hidden rows, times `linear`: logits.

    Args:
        hidden: float32 [rows, hidden].
        norm: float32 [hidden], weight of the norm.
        eps: Of the norm, float32.
        inputs: Where rows are packed for products.
        linear: [width * hidden].
        config: Tile shapes, None without AMX.
        out: float32 [rows, width].
        scratch: `Scratch`.
    """
    scratch.progress[:] = 0
    launch(scratch.progress.shape[0], _project_thread, (hidden, norm, eps, inputs, linear, config, out, scratch))


@njit(**INNER)
def _layer_turn(  # type: ignore[no-untyped-def]
    turn,
    share,
    shares,
    layer,
    x,
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
    scratch,
    pieces,
    num_pieces,
    zeros,
    kept,
    totals,
):
    """One of the `_TURNS` of a layer."""
    none, memory = np.empty(0, np.float32), scratch.thread[share]
    if turn == 0:
        norm = weights.input_norm[layer]
        call_separately(prepare, (share, shares, x, norm, eps, inputs, of_layer(weights.qkv, layer)))
    elif turn == 1:
        qkv, bias = of_layer(weights.qkv, layer), weights.qkv_bias[layer]
        size, out = x.shape[1], scratch.qkv
        call_separately(multiply, (share, shares, inputs, size, config, qkv, bias, out, memory, False))
    elif turn == 2:
        angles = step.cos.shape[1] if weights.rotated[layer] else 0
        cos, sin = step.cos[:, :angles], step.sin[:, :angles]
        q_norm, k_norm, paired = weights.q_norm[layer], weights.k_norm[layer], attention_config is not None
        row = (scratch.qkv, cos, sin, q_norm, k_norm, eps, scale, step.slots, paired)
        call_separately(rotate_and_cache, (share, shares, *row, scratch.queries, keys[layer], values[layer]))
    elif turn == 3:
        out, window = scratch.attended, weights.window[layer]
        seen = (scratch.queries, keys[layer], values[layer], step.tables, step.sequence, step.positions, window)
        if attention_config is not None:
            call_separately(tile_attention, (share, shares, *seen, pieces, num_pieces, attention_config, out))
        else:
            call_separately(paged_attention, (share, shares, *seen, out))
    elif turn == 4:
        rows = scratch.attended
        call_separately(prepare, (share, shares, rows, none, eps, inputs_o, of_layer(weights.o, layer)))
    elif turn == 5:
        o, bias, size = of_layer(weights.o, layer), weights.o_bias[layer], scratch.attended.shape[1]
        call_separately(multiply, (share, shares, inputs_o, size, config, o, bias, x, memory, True))
    else:
        gate, up, down = of_layer(weights.gate, layer), of_layer(weights.up, layer), of_layer(weights.down, layer)
        matrices, configs = (gate, up, down), (config, down_config)
        norm, own_turn = weights.post_norm[layer], turn - _FEED_FORWARD
        feed_forward_turn(
            own_turn, share, shares, x, norm, eps, inputs, *configs, skip, *matrices, step, layer, identity, scratch, x
        )
        if turn == _TURNS - 1 and share == 0:
            for r in range(x.shape[0]):
                zeros[layer, r] = scratch.zeros[:, r].sum()
                kept[layer, r] = scratch.kept[:, r].sum()
                totals[1 + r] += zeros[layer, r]
            totals[0] += scratch.neurons.sum()


@njit(**INNER)
def _run_thread(thread, layers, arguments, scratch):  # type: ignore[no-untyped-def]
    shares = scratch.progress.shape[0]
    for turn in range(layers * _TURNS):
        share = next_share(scratch.progress, turn, thread)
        while share >= 0:
            _layer_turn(turn % _TURNS, share, shares, turn // _TURNS, *arguments)
            finish(scratch.progress, turn, share)
            share = next_share(scratch.progress, turn, thread)


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
    pieces = np.empty(rows + 1, np.int64)
    num_pieces = list_pieces(step.sequence, step.positions, scratch.queries.shape[1] // keys.shape[2], pieces)
    arguments = (
        x,
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
        scratch,
        pieces,
        num_pieces,
        zeros,
        kept,
        totals,
    )
    scratch.progress[:] = 0
    launch(scratch.progress.shape[0], _run_thread, (weights.input_norm.shape[0], arguments, scratch))
