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
from engine.kernels.cpu.feed_forward import FeedForward, feed_forward_turn
from engine.kernels.cpu.linear import multiply, prepare
from engine.kernels.cpu.math import widen
from engine.kernels.cpu.options import INNER, OPTIONS, UNCACHED
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


class Layers(NamedTuple):
    """What all layers of a step read and write."""

    x: Any  # out, float32 [rows, hidden]
    embedding: Any  # [vocabulary, hidden], float32 or bfloat16 bits
    weights: Any  # `LayerArrays`
    step: Any  # `StepRows`
    skip: Any  # see `FeedForward`
    keys: Any  # the cache of all layers
    values: Any
    eps: Any  # of norms, float32
    scale: Any  # of queries, float32
    identity: Any  # positive branch
    inputs: Any  # where rows of `hidden` are packed for products
    inputs_o: Any  # likewise for the attention's output
    config: Any  # tile shapes of products, None without AMX
    down_config: Any  # of `multiply_down`
    attention_config: Any  # of `tile_attention`, whose layout the cache then has, or None
    scratch: Any  # `Scratch`
    zeros: Any  # out, int64 [layers, rows], zeros of each row's activations
    kept: Any  # out, int64 [layers, rows], negative values that SILU kept, of stochastic rows
    totals: Any  # out, int64 [1 + rows]: neurons read in `up` and `down`, then zeros of each row, over all layers


@njit(**UNCACHED)
def _attend(share, shares, seen, pieces, num_pieces, config, out):  # type: ignore[no-untyped-def]
    """By tiles or by vectors. A function of its own, for Numba leaves out branches by its arguments' types only."""
    if config is not None:
        call_separately(tile_attention, (share, shares, *seen, pieces, num_pieces, config, out))
    else:
        call_separately(paged_attention, (share, shares, *seen, out))


@njit(**UNCACHED)
def _layer_turn(turn, share, shares, layer, work, pieces, num_pieces):  # type: ignore[no-untyped-def]
    """One of the `_TURNS` of a layer."""
    x, weights, step, scratch = work.x, work.weights, work.step, work.scratch
    memory = scratch.thread[share]
    if turn == 0:
        norm = weights.input_norm[layer]
        call_separately(prepare, (share, shares, x, norm, work.eps, work.inputs, of_layer(weights.qkv, layer)))
    elif turn == 1:
        rows, linear = (work.inputs, x.shape[1], work.config), of_layer(weights.qkv, layer)
        call_separately(multiply, (share, shares, *rows, linear, weights.qkv_bias[layer], scratch.qkv, memory, False))
    elif turn == 2:
        angles = step.cos.shape[1] if weights.rotated[layer] else 0
        rotation = (step.cos[:, :angles], step.sin[:, :angles])
        norms = (weights.q_norm[layer], weights.k_norm[layer], work.eps)
        out = (scratch.queries, work.keys[layer], work.values[layer])
        paired = work.attention_config is not None
        given = (scratch.qkv, *rotation, *norms, work.scale, step.slots, paired)
        call_separately(rotate_and_cache, (share, shares, *given, *out))
    elif turn == 3:
        cache = (work.keys[layer], work.values[layer], step.tables)
        seen = (scratch.queries, *cache, step.sequence, step.positions, weights.window[layer])
        _attend(share, shares, seen, pieces, num_pieces, work.attention_config, scratch.attended)
    elif turn == 4:
        given_o = (scratch.attended, np.empty(0, np.float32), work.eps, work.inputs_o)  # without a norm
        call_separately(prepare, (share, shares, *given_o, of_layer(weights.o, layer)))
    elif turn == 5:
        rows_o, linear = (work.inputs_o, scratch.attended.shape[1], work.config), of_layer(weights.o, layer)
        call_separately(multiply, (share, shares, *rows_o, linear, weights.o_bias[layer], x, memory, True))
    else:
        feed_forward = FeedForward(
            x=x,
            norm=weights.post_norm[layer],
            eps=work.eps,
            inputs=work.inputs,
            config=work.config,
            down_config=work.down_config,
            skip=work.skip,
            gate=of_layer(weights.gate, layer),
            up=of_layer(weights.up, layer),
            down=of_layer(weights.down, layer),
            step=step,
            layer=layer,
            identity=work.identity,
            scratch=scratch,
            out=x,
        )
        feed_forward_turn(turn - _FEED_FORWARD, share, shares, feed_forward)
        if turn == _TURNS - 1 and share == 0:
            for r in range(x.shape[0]):
                work.zeros[layer, r] = scratch.zeros[:, r].sum()
                work.kept[layer, r] = scratch.kept[:, r].sum()
                work.totals[1 + r] += work.zeros[layer, r]
            work.totals[0] += scratch.neurons.sum()


@njit(**INNER)
def _run_thread(thread, work, pieces, num_pieces):  # type: ignore[no-untyped-def]
    progress = work.scratch.progress
    for turn in range(work.weights.input_norm.shape[0] * _TURNS):
        share = next_share(progress, turn, thread)
        while share >= 0:
            _layer_turn(turn % _TURNS, share, progress.shape[0], turn // _TURNS, work, pieces, num_pieces)
            finish(progress, turn, share)
            share = next_share(progress, turn, thread)


@njit(**OPTIONS)
def run_layers(work):  # type: ignore[no-untyped-def]
    """All decoder layers of a step; `work` is a `Layers`."""
    x, step, progress = work.x, work.step, work.scratch.progress
    rows, hidden = x.shape
    work.totals[:] = 0
    for r in range(rows):
        for k in range(hidden):
            x[r, k] = widen(work.embedding[step.tokens[r], k])
    pieces = np.empty(rows + 1, np.int64)
    group = work.scratch.queries.shape[1] // work.keys.shape[2]
    num_pieces = list_pieces(step.sequence, step.positions, group, pieces)
    progress[:] = 0
    launch(progress.shape[0], _run_thread, (work, pieces, num_pieces))
