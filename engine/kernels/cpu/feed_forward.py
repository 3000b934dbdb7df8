"""The gated feed-forward of a layer: act(gate) * up, times down; dense, or without what only meets zeros."""

from typing import Any, NamedTuple

from numba import njit
from numba.extending import register_jitable

from engine.activation import MODE_CODE, ActivationMode
from engine.kernels.cpu.activation import activate
from engine.kernels.cpu.compact import compacted, fetch_neurons, product_listed
from engine.kernels.cpu.down import column_unit, keep_hidden, multiply_down, neuron_parts, skip_down
from engine.kernels.cpu.linear import TILES, prepare
from engine.kernels.cpu.options import FEW_ROWS, INNER, OPTIONS, UNCACHED
from engine.kernels.cpu.product import BLOCK, TOKEN_ROWS, product
from engine.kernels.cpu.rows import multiply_chunk
from engine.kernels.cpu.separate import call_separately
from engine.kernels.cpu.team import finish, launch, next_share
from engine.kernels.cpu.tiles import ROWS, configure, release

PARTS = 16  # of the neurons, which threads take one after another
TURNS = 4  # of the team: rows laid out; gate and up; down; the sums of its parts
_SILU = MODE_CODE[ActivationMode.SILU]


@register_jitable
def step_of_parts(blocks: int) -> int:
    """Blocks that parts keep together: a group of 64 neurons, which some formats need whole."""
    return 2 if blocks % 2 == 0 else 1


@njit(**INNER)
def _part_begin(blocks, step, part, parts):  # type: ignore[no-untyped-def]
    """First block of a part; parts are made of whole steps."""
    return blocks // step * part // parts * step


@njit(**INNER)
def neurons_of(intermediate, part, parts):  # type: ignore[no-untyped-def]
    """First neuron of a part, and of the next one."""
    blocks = intermediate // BLOCK
    step = step_of_parts(blocks)
    return _part_begin(blocks, step, part, parts) * BLOCK, _part_begin(blocks, step, part + 1, parts) * BLOCK


@njit(**INNER)
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


@njit(**INNER)
def _list_active(values, at, width, rows, first, places, begin):  # type: ignore[no-untyped-def]
    """Those of 32 neurons with values[at + r * width + j] != 0 in any row, to places[begin:]; returns the end."""
    for j in range(BLOCK):
        used = False
        for r in range(rows):
            used |= values[at + r * width + j] != 0
        places[begin] = first + j
        begin += used
    return begin


@njit(**OPTIONS)
def gate_and_up(share, shares, inputs, config, skip, rows, hidden, gate, up, step_rows, layer, identity, scratch, h):  # type: ignore[no-untyped-def]
    """h = act(gate) * up of all rows; counts are added up in `scratch`.

    Args:
        share, shares: Which neurons, see `team`.
        inputs: Packed rows.
        config: Tile shapes, None without AMX.
        skip: Read `up` only for neurons that are active in some row; the result is the same to the last bit.
        rows: How many.
        hidden: Width of a row.
        gate, up: [intermediate * hidden], one layer's.
        step_rows: See `StepRows`.
        layer: Decoder layer, for the draws.
        identity: Positive branch.
        scratch: See `Scratch`.
        h: Out, [rows16 * intermediate], as `multiply_down` wants it.
    """
    intermediate = scratch.intermediate
    # Many rows: parts stay in the cache from gate to up. Few: long stretches of weights come faster from memory.
    # Skipping: active neurons of a whole share fill their blocks.
    parts = shares if skip or rows <= FEW_ROWS else max(PARTS, shares)
    zeros, kept = scratch.zeros, scratch.kept
    if config is not None:
        configure(config)
    buffer, words, places = scratch.thread[share], scratch.words[share], scratch.places[share]
    copy = compacted(up, hidden, scratch.copies[share])
    for part in range(parts * share // shares, parts * (share + 1) // shares):
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
        scratch.neurons[part] = min(read, width)
    if config is not None:
        release()


@njit(**INNER)
def _add_part(  # type: ignore[no-untyped-def]
    h, rows, intermediate, config, skip, down, hidden, part, parts, first, last, totals, places, memory, words, out
):
    """out += h times `down`, of one part of the neurons and columns from first to last; either may be empty."""
    begin, end = neurons_of(intermediate, part, parts)
    if begin >= end or first >= last:
        return
    if skip:
        skip_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, places, memory, out)
    else:
        if config is not None:
            configure(config)
        multiply_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, words, out)
        if config is not None:
            release()


@njit(**INNER)
def _summed_apart(rows, h):  # type: ignore[no-untyped-def]
    """Whether each part of the neurons has sums of its own, which `add_parts` adds up."""
    return rows <= FEW_ROWS and neuron_parts(h) > 1


@njit(**OPTIONS)
def multiply_hidden(share, shares, x, config, skip, down, scratch, h, totals):  # type: ignore[no-untyped-def]
    """x += h times `down`, with few rows only once `add_parts` has been called.

    With many rows, which go through the weights of a part while these are in a cache, columns are shared out. With few,
    threads wait for memory, which is fastest when each reads a stretch of its own: parts of the neurons are. Only where
    the number of threads does not divide that of the parts, columns are shared out as well.

    Args:
        share, shares: Which part of the work, see `team`.
        x: float32 [rows, hidden].
        config: Tile shapes of `multiply_down`, None without AMX.
        skip: Read `down` only for neurons that are active in some row; the result is the same to the last bit.
        down: [intermediate * hidden].
        scratch: See `Scratch`.
        h: [rows16 * intermediate].
        totals: See `Scratch`.
    """
    rows, hidden = x.shape
    unit, parts, intermediate = column_unit(h), neuron_parts(h), scratch.intermediate
    units, apart = hidden // unit, _summed_apart(rows, h)
    # A task is a part of the neurons and a piece of the columns.
    pieces, first_task, end, step, size = shares, share, parts * shares, shares, 0
    if apart:
        pieces, step, size = 1, 1, ROWS * hidden
        while parts * pieces % shares:
            pieces += 1
        first_task, end = parts * pieces * share // shares, parts * pieces * (share + 1) // shares
    out = x.reshape(-1)
    for task in range(first_task, end, step):
        part, piece = task // pieces, task % pieces
        first, last = units * piece // pieces * unit, units * (piece + 1) // pieces * unit
        if apart:
            out = scratch.partials[part]
            for r in range(rows):
                out[r * hidden + first : r * hidden + last] = 0
        _add_part(
            h,
            rows,
            intermediate,
            config,
            skip,
            down,
            hidden,
            part,
            parts,
            first,
            last,
            totals[part * size :],
            scratch.places[share],
            scratch.thread[share],
            scratch.words[share],
            out,
        )


@njit(**OPTIONS)
def add_parts(share, shares, x, scratch, h):  # type: ignore[no-untyped-def]
    """x += what `multiply_hidden` summed apart, part by part. The arguments are its own; columns are shared out."""
    rows, hidden = x.shape
    if not _summed_apart(rows, h):
        return
    parts, blocks = neuron_parts(h), hidden // BLOCK
    left, right = blocks * share // shares * BLOCK, blocks * (share + 1) // shares * BLOCK
    for part in range(parts):
        begin, end = neurons_of(scratch.intermediate, part, parts)
        if begin < end:
            for r in range(rows):
                for k in range(left, right):
                    x[r, k] += scratch.partials[part, r * hidden + k]


class FeedForward(NamedTuple):
    """What the feed-forward of a layer reads and writes."""

    x: Any  # float32 [rows, hidden]
    norm: Any  # float32 [hidden], or [0] if the rows are normalised
    eps: Any  # of the norm, float32
    inputs: Any  # where rows are packed for products
    config: Any  # tile shapes of products, None without AMX
    down_config: Any  # of `multiply_down`
    skip: Any  # see `gate_and_up` and `multiply_hidden`
    gate: Any  # one layer's weights
    up: Any
    down: Any
    step: Any  # `StepRows`
    layer: Any  # for the draws
    identity: Any  # positive branch
    scratch: Any  # `Scratch`
    out: Any  # float32 [rows, hidden]; may be `x` itself


@njit(**UNCACHED)
def feed_forward_turn(turn, share, shares, work):  # type: ignore[no-untyped-def]
    """One of the `TURNS` of `feed_forward`, see `team`."""
    scratch, (rows, hidden) = work.scratch, work.x.shape
    if turn == 0:
        call_separately(prepare, (share, shares, work.x, work.norm, work.eps, work.inputs, work.gate))
        if share == 0:
            scratch.zeros[:, :rows] = 0
            scratch.kept[:, :rows] = 0
            scratch.neurons[:] = 0
    elif turn == 1:
        rows_in = (work.inputs, work.config, work.skip, rows, hidden)
        drawn = (work.step, work.layer, work.identity)
        call_separately(gate_and_up, (share, shares, *rows_in, work.gate, work.up, *drawn, scratch, scratch.h))
    elif turn == 2:
        how = (work.down_config, work.skip, work.down)
        call_separately(multiply_hidden, (share, shares, work.out, *how, scratch, scratch.h, scratch.totals))
    else:
        call_separately(add_parts, (share, shares, work.out, scratch, scratch.h))


@njit(**INNER)
def _feed_forward_thread(thread, work):  # type: ignore[no-untyped-def]
    progress = work.scratch.progress
    for turn in range(TURNS):
        share = next_share(progress, turn, thread)
        while share >= 0:
            feed_forward_turn(turn, share, progress.shape[0], work)
            finish(progress, turn, share)
            share = next_share(progress, turn, thread)


@njit(**OPTIONS)
def feed_forward(work):  # type: ignore[no-untyped-def]
    """`work` is a `FeedForward`: out += the whole gated block of its rows x; counts by part are in its `scratch`.

    Reads gate in full, and up and down in full or, with `skip`, for neurons that are active in some row.
    """
    progress = work.scratch.progress
    progress[:] = 0
    launch(progress.shape[0], _feed_forward_thread, (work,))
