"""All layers of a step in one compiled call, without Python or allocation between them.

A layer is five parallel regions: queries, keys and values; attention; its output; gate and up; down. What lies between,
norms and the layout of rows for products, is done by the calling thread while there are few rows. The work of a region
is cut by neurons, never along a sum that could then depend on the number of threads.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange
from numba.extending import overload, register_jitable
from numpy.typing import NDArray

import engine.kernels.cpu.integer
import engine.kernels.cpu.integer_plain  # noqa: F401
from engine.activation import MODE_CODE, ActivationMode
from engine.kernels.cpu.activation import activate
from engine.kernels.cpu.attention import paged_attention, rotate_and_cache
from engine.kernels.cpu.attention_tiles import list_pieces, tile_attention
from engine.kernels.cpu.compact import compacted, fetch_neurons, product_listed
from engine.kernels.cpu.down import column_unit, keep_hidden, multiply_down, neuron_parts, skip_down
from engine.kernels.cpu.math import widen
from engine.kernels.cpu.options import FEW_ROWS, OPTIONS
from engine.kernels.cpu.product import BLOCK, TOKEN_ROWS, is_kind, pack_row, pack_tile, product
from engine.kernels.cpu.quantised import Int4Weight, Int8Down, Int8Weight, PlainIntegerWeight
from engine.kernels.cpu.rows import add_chunk, multiply_chunk
from engine.kernels.cpu.simd import dot
from engine.kernels.cpu.tiles import ROWS, configure, release

PARTS = 16  # of the neurons, which threads take one after another
_SILU = MODE_CODE[ActivationMode.SILU]
TILES = 2048  # floats of a thread's memory for stored tiles

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


class Scratch(NamedTuple):
    """Memory of a step. Sizes are those of the rows at hand, or more."""

    qkv: Array  # float32 [rows, q_size + 2 * kv_size]
    queries: Array  # float32 [rows, num_heads, head_dim]
    attended: Array  # float32 [rows, q_size]
    h: Any  # [rows16 * intermediate], act(gate) * up as `multiply_down` wants it
    intermediate: int
    totals: Array  # float32 [rows16 * hidden], or [NEURON_PARTS * 16 * hidden] if that is more
    partials: Array  # float32 [NEURON_PARTS, FEW_ROWS * hidden]
    zeros: Array  # int64 [PARTS or threads, rows], see `activate`
    kept: Array  # likewise
    neurons: Array  # int64 [PARTS or threads], whose weights in `up` and `down` were read
    thread: Array  # float32 [threads, TILES + rows of a chunk * (BLOCK + widest part of neurons)]
    words: Array  # uint32 [threads, PANEL * PANEL_COLUMNS / 2 or the widest part of neurons]
    places: Array  # int64 [threads, intermediate + 66]
    copies: Array  # uint8 [threads, 4 * BLOCK * hidden]


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


@register_jitable
def step_of_parts(blocks: int) -> int:
    """Blocks that parts keep together: a group of 64 neurons, which some formats need whole."""
    return 2 if blocks % 2 == 0 else 1


@njit(**OPTIONS)
def _part_begin(blocks, step, part, parts):  # type: ignore[no-untyped-def]
    """First block of a part; parts are made of whole steps."""
    return blocks // step * part // parts * step


@njit(**OPTIONS)
def neurons_of(intermediate, part, parts):  # type: ignore[no-untyped-def]
    """First neuron of a part, and of the next one."""
    blocks = intermediate // BLOCK
    step = step_of_parts(blocks)
    return _part_begin(blocks, step, part, parts) * BLOCK, _part_begin(blocks, step, part + 1, parts) * BLOCK


@njit(**OPTIONS)
def _normalise(row, weight, eps, out):  # type: ignore[no-untyped-def]
    """out = row / sqrt(mean(row**2) + eps) * weight."""
    scale = np.float32(1) / np.sqrt(dot(row, 0, row, 0, row.size) / np.float32(row.size) + eps)
    for k in range(row.size):
        out[k] = row[k] * scale * weight[k]


@njit(**OPTIONS)
def _prepare_row(r, rows, x, weight, eps, inputs, linear, scratch):  # type: ignore[no-untyped-def]
    """Normalise row r (if there is a weight) and lay it out for products by `linear`."""
    row = x[r]
    if weight.size:
        _normalise(row, weight, eps, scratch)
        row = scratch[: row.size]
    pack_row(r, row, rows, inputs, linear)


@njit(parallel=True, **OPTIONS)
def _prepare_many(x, weight, eps, inputs, linear):  # type: ignore[no-untyped-def]
    rows = x.shape[0]
    for tile in prange((rows + ROWS - 1) // ROWS):
        first = tile * ROWS
        block = x[first : min(first + ROWS, rows)]
        if weight.size:
            normalised = np.empty(block.shape, np.float32)
            for r in range(block.shape[0]):
                _normalise(block[r], weight, eps, normalised[r])
            pack_tile(first, normalised, rows, inputs, linear)
        else:
            pack_tile(first, block, rows, inputs, linear)


@njit(**OPTIONS)
def prepare(x, weight, eps, inputs, linear):  # type: ignore[no-untyped-def]
    """RMSNorm of every row (none without a weight), laid out for products by `linear`.

    Args:
        x: float32 [rows, size].
        weight: float32 [size] or [0].
        eps: float32.
        inputs: Out, see `product`.
        linear: A weight of the layer that reads the rows; only its type counts.
    """
    rows, size = x.shape
    if rows <= FEW_ROWS:
        scratch = np.empty(size, np.float32)
        for r in range(rows):
            _prepare_row(r, rows, x, weight, eps, inputs, linear, scratch)
    else:
        _prepare_many(x, weight, eps, inputs, linear)


@njit(**OPTIONS)
def _first_neuron(block, size):  # type: ignore[no-untyped-def]
    """Where a block begins; the last one overlaps the one before it where `size` is no multiple of 32."""
    return min(block * BLOCK, size - BLOCK)


@njit(parallel=True, **OPTIONS)
def multiply(inputs, size, config, linear, bias, out, threads, scratch, add):  # type: ignore[no-untyped-def]
    """out = rows times `linear` + bias, or out += with `add` (then `out` must be a multiple of 32 wide).

    Args:
        inputs: Packed rows.
        size: Their width.
        config: Tile shapes, None without AMX.
        linear: [width * size].
        bias: float32 [width] or [0].
        out: float32 [rows, width].
        threads: How many there are.
        scratch: See `Scratch.thread`.
        add: Whether to add.
    """
    rows, width = out.shape
    blocks = (width + BLOCK - 1) // BLOCK
    for thread in prange(threads):
        if config is not None:
            configure(config)
        memory = scratch[thread]
        in_place = out.reshape(-1)
        for b in range(blocks * thread // threads, blocks * (thread + 1) // threads):
            neuron = _first_neuron(b, width)
            for first in range(0, rows, TOKEN_ROWS):
                last = min(first + TOKEN_ROWS, rows)
                target = first * width + neuron
                if bias.size == 0 and not add:
                    product(inputs, rows, first, last, size, linear, neuron, in_place, target, width, memory)
                    continue
                product(inputs, rows, first, last, size, linear, neuron, memory, TILES, BLOCK, memory)
                for r in range(last - first):
                    at, place = TILES + r * BLOCK, target + r * width
                    if bias.size:
                        add_chunk(memory, at, bias, neuron)
                    if add:
                        add_chunk(in_place, place, memory, at)
                    else:
                        in_place[place : place + BLOCK] = memory[at : at + BLOCK]
        if config is not None:
            release()


@njit(**OPTIONS)
def _activate(values, at, width, size, top, bottom, first, rows, layer, identity, words, zeros, kept):  # type: ignore[no-untyped-def]
    """Activate values[at + (r - top) * width + j], j < size, of neurons first + j; adds to the counts of each row."""
    for r in range(top, bottom):
        place = at + (r - top) * width
        some_zeros, some_kept = activate(
            values[place : place + size],
            first,
            rows.thresholds[r],
            rows.keys[r, 0],
            rows.keys[r, 1],
            rows.positions[r],
            rows.modes[r] == _SILU,
            layer,
            identity,
            words,
        )
        zeros[r] += some_zeros
        kept[r] += some_kept


@njit(**OPTIONS)
def _list_active(values, at, width, rows, first, places, begin):  # type: ignore[no-untyped-def]
    """Those of 32 neurons with values[at + r * width + j] != 0 in any row, to places[begin:]; returns the end."""
    for j in range(BLOCK):
        used = False
        for r in range(rows):
            used |= values[at + r * width + j] != 0
        places[begin] = first + j
        begin += used
    return begin


@njit(parallel=True, **OPTIONS)
def gate_and_up(inputs, config, skip, rows, hidden, gate, up, step_rows, layer, identity, threads, scratch, h):  # type: ignore[no-untyped-def]
    """h = act(gate) * up of all rows; counts are in `scratch`.

    Args:
        inputs: Packed rows.
        config: Tile shapes, None without AMX.
        skip: Read `up` only for neurons that are active in some row; the result is the same to the last bit.
        rows: How many.
        hidden: Width of a row.
        gate, up: [intermediate * hidden], one layer's.
        step_rows: See `StepRows`.
        layer: Decoder layer, for the draws.
        identity: Positive branch.
        threads: How many there are.
        scratch: See `Scratch`.
        h: Out, [rows16 * intermediate], as `multiply_down` wants it.
    """
    intermediate = scratch.intermediate
    # Many rows: parts stay in the cache from gate to up. Few: long stretches of weights come faster from memory.
    # Skipping: active neurons of a whole thread fill their blocks.
    parts = threads if skip or rows <= FEW_ROWS else max(PARTS, threads)
    zeros, kept, neurons = scratch.zeros, scratch.kept, scratch.neurons
    zeros[:, :rows] = 0
    kept[:, :rows] = 0
    neurons[:] = 0
    memory, all_words, all_places, all_copies = scratch.thread, scratch.words, scratch.places, scratch.copies
    for thread in prange(threads):
        if config is not None:
            configure(config)
        buffer, words, places = memory[thread], all_words[thread], all_places[thread]
        copy = compacted(up, hidden, all_copies[thread])
        for part in range(parts * thread // threads, parts * (thread + 1) // threads):
            begin, end = neurons_of(intermediate, part, parts)
            width = end - begin
            read = 0 if skip else width
            for top in range(0, rows, TOKEN_ROWS):
                bottom = min(top + TOKEN_ROWS, rows)
                block = TILES + (bottom - top) * width
                values = buffer[TILES:block]
                count = 0
                for neuron in range(begin, end, BLOCK):
                    at = TILES + neuron - begin
                    product(inputs, rows, top, bottom, hidden, gate, neuron, buffer, at, width, buffer)
                    if skip:  # rows of `up` are on their way while other neurons' gates are computed
                        _activate(
                            buffer,
                            at,
                            width,
                            BLOCK,
                            top,
                            bottom,
                            neuron,
                            step_rows,
                            layer,
                            identity,
                            words,
                            zeros[part],
                            kept[part],
                        )
                        listed = _list_active(buffer, at, width, bottom - top, neuron, places, count)
                        fetch_neurons(up, hidden, places, count, listed)
                        count = listed
                if skip:
                    read += count  # several chunks may share some: at most so many
                    for i in range(0, count, BLOCK):
                        listed = min(BLOCK, count - i)
                        product_listed(
                            inputs,
                            rows,
                            top,
                            bottom,
                            hidden,
                            up,
                            places,
                            i,
                            listed,
                            copy,
                            buffer,
                            block,
                            BLOCK,
                            buffer,
                        )
                        for r in range(bottom - top):
                            for n in range(listed):
                                values[r * width + places[i + n] - begin] *= buffer[block + r * BLOCK + n]
                else:
                    _activate(
                        buffer,
                        TILES,
                        width,
                        width,
                        top,
                        bottom,
                        begin,
                        step_rows,
                        layer,
                        identity,
                        words,
                        zeros[part],
                        kept[part],
                    )
                    for neuron in range(begin, end, BLOCK):
                        product(inputs, rows, top, bottom, hidden, up, neuron, buffer, block, BLOCK, buffer)
                        for r in range(bottom - top):
                            multiply_chunk(buffer, TILES + r * width + neuron - begin, buffer, block + r * BLOCK)
                for r in range(top, bottom):
                    keep_hidden(h, r, intermediate, begin, values[(r - top) * width : (r - top + 1) * width])
            neurons[part] = min(read, width)
        if config is not None:
            release()


@njit(**OPTIONS)
def _add_neurons(  # type: ignore[no-untyped-def]
    h, rows, intermediate, config, skip, down, hidden, begin, end, first, last, totals, places, memory, words, out
):
    """out += h times `down`, of neurons from begin to end and columns from first to last."""
    if skip:
        skip_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, places, memory, out)
    else:
        if config is not None:
            configure(config)
        multiply_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, words, out)
        if config is not None:
            release()


@njit(parallel=True, **OPTIONS)
def _share_columns(x, config, skip, down, threads, scratch, h, totals):  # type: ignore[no-untyped-def]
    """`multiply_hidden` of many rows, which go through the weights of a part while these are in a cache."""
    rows, hidden = x.shape
    unit, parts, intermediate = column_unit(h), neuron_parts(h), scratch.intermediate
    units, words, places, memory = hidden // unit, scratch.words, scratch.places, scratch.thread
    out = x.reshape(-1)
    for thread in prange(threads):
        first, last = units * thread // threads * unit, units * (thread + 1) // threads * unit
        for part in range(parts):
            begin, end = neurons_of(intermediate, part, parts)
            if begin < end and first < last:
                _add_neurons(
                    h,
                    rows,
                    intermediate,
                    config,
                    skip,
                    down,
                    hidden,
                    begin,
                    end,
                    first,
                    last,
                    totals,
                    places[thread],
                    memory[thread],
                    words[thread],
                    out,
                )


@njit(parallel=True, **OPTIONS)
def _share_neurons(rows, hidden, config, skip, down, threads, scratch, h, totals):  # type: ignore[no-untyped-def]
    """The sums of each part of the neurons, of few rows, to `scratch.partials`.

    Threads wait for memory, which is fastest when each reads a stretch of its own. Only where their number does not
    divide that of the parts, columns are shared out as well.
    """
    unit, parts, intermediate = column_unit(h), neuron_parts(h), scratch.intermediate
    units, words, places, memory = hidden // unit, scratch.words, scratch.places, scratch.thread
    partials, size = scratch.partials, ROWS * hidden
    pieces = 1
    while parts * pieces % threads:
        pieces += 1
    for thread in prange(threads):
        for task in range(parts * pieces * thread // threads, parts * pieces * (thread + 1) // threads):
            part, piece = task // pieces, task % pieces
            begin, end = neurons_of(intermediate, part, parts)
            first, last = units * piece // pieces * unit, units * (piece + 1) // pieces * unit
            out = partials[part]
            for r in range(rows):
                out[r * hidden + first : r * hidden + last] = 0
            if begin < end and first < last:
                _add_neurons(
                    h,
                    rows,
                    intermediate,
                    config,
                    skip,
                    down,
                    hidden,
                    begin,
                    end,
                    first,
                    last,
                    totals[part * size : (part + 1) * size],
                    places[thread],
                    memory[thread],
                    words[thread],
                    out,
                )


@njit(**OPTIONS)
def multiply_hidden(x, config, skip, down, threads, scratch, h, totals):  # type: ignore[no-untyped-def]
    """x += h times `down`.

    Args:
        x: float32 [rows, hidden].
        config: Tile shapes of `multiply_down`, None without AMX.
        skip: Read `down` only for neurons that are active in some row; the result is the same to the last bit.
        down: [intermediate * hidden].
        threads: How many there are.
        scratch: See `Scratch`.
        h: [rows16 * intermediate].
        totals: See `Scratch`.
    """
    rows, hidden = x.shape
    parts, partials = neuron_parts(h), scratch.partials
    if rows > FEW_ROWS or parts == 1:
        _share_columns(x, config, skip, down, threads, scratch, h, totals)
        return
    _share_neurons(rows, hidden, config, skip, down, threads, scratch, h, totals)
    for part in range(parts):
        begin, end = neurons_of(scratch.intermediate, part, parts)
        if begin < end:
            for r in range(rows):
                for k in range(hidden):
                    x[r, k] += partials[part, r * hidden + k]


@njit(**OPTIONS)
def feed_forward(  # type: ignore[no-untyped-def]
    x, norm, eps, inputs, config, down_config, skip, gate, up, down, step, layer, identity, threads, scratch, out
):
    """out += the whole gated feed-forward of the normalised rows x; counts by part are in `scratch`.

    Reads gate in full, and up and down in full or, with `skip`, for neurons that are active in some row.

    Args:
        x: float32 [rows, hidden].
        norm: float32 [hidden], or [0] if the rows are normalised.
        out: float32 [rows, hidden]; may be `x` itself.

    The other arguments are those of `gate_and_up` and `multiply_hidden`.
    """
    rows, hidden = x.shape
    prepare(x, norm, eps, inputs, gate)
    gate_and_up(inputs, config, skip, rows, hidden, gate, up, step, layer, identity, threads, scratch, scratch.h)
    multiply_hidden(out, down_config, skip, down, threads, scratch, scratch.h, scratch.totals)


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
