"""Token rows and a layer's matrices: rows are normalised and laid out once, then multiplied, 32 neurons at a time.

Each function computes one share of the work, see `team`. Products are cut by neurons, never along a sum that could then
depend on the number of threads.
"""

import numpy as np
from numba import njit

import engine.kernels.cpu.integer
import engine.kernels.cpu.integer_plain  # noqa: F401
from engine.kernels.cpu.options import INNER, OPTIONS
from engine.kernels.cpu.product import BLOCK, TOKEN_ROWS, pack_tile, product, rows_together
from engine.kernels.cpu.rows import add_chunk
from engine.kernels.cpu.simd import dot
from engine.kernels.cpu.tiles import configure, release

TILES = 2048  # floats of a thread's memory for stored tiles


@njit(**INNER)
def _normalise(row, weight, eps, out):  # type: ignore[no-untyped-def]
    """out = row / sqrt(mean(row**2) + eps) * weight."""
    scale = np.float32(1) / np.sqrt(dot(row, 0, row, 0, row.size) / np.float32(row.size) + eps)
    for k in range(row.size):
        out[k] = row[k] * scale * weight[k]


@njit(**OPTIONS)
def prepare(share, shares, x, weight, eps, inputs, linear):  # type: ignore[no-untyped-def]
    """RMSNorm of rows (none without a weight), laid out for products by `linear`.

    Args:
        share, shares: Which rows, see `team`.
        x: float32 [rows, size].
        weight: float32 [size] or [0].
        eps: float32.
        inputs: Out, see `product`.
        linear: A weight of the layer that reads the rows; only its type counts.
    """
    rows, size = x.shape
    unit = rows_together(inputs)
    units = (rows + unit - 1) // unit
    normalised = np.empty((unit if weight.size else 0, size), np.float32)
    for first in range(units * share // shares * unit, units * (share + 1) // shares * unit, unit):
        block = x[first : min(first + unit, rows)]
        if weight.size:
            for r in range(block.shape[0]):
                _normalise(block[r], weight, eps, normalised[r])
            block = normalised[: block.shape[0]]
        pack_tile(first, block, rows, inputs, linear)


@njit(**INNER)
def _first_neuron(block, size):  # type: ignore[no-untyped-def]
    """Where a block begins; the last one overlaps the one before it where `size` is no multiple of 32."""
    return min(block * BLOCK, size - BLOCK)


@njit(**OPTIONS)
def multiply(share, shares, inputs, size, config, linear, bias, out, memory, add):  # type: ignore[no-untyped-def]
    """out = rows times `linear` + bias, or out += with `add` (then `out` must be a multiple of 32 wide).

    Args:
        share, shares: Which columns of `out`, see `team`.
        inputs: Packed rows.
        size: Their width.
        config: Tile shapes, None without AMX.
        linear: [width * size].
        bias: float32 [width] or [0].
        out: float32 [rows, width].
        memory: A line of `Scratch.thread`.
        add: Whether to add.
    """
    rows, width = out.shape
    blocks = (width + BLOCK - 1) // BLOCK
    if config is not None:
        configure(config)
    in_place = out.reshape(-1)
    for b in range(blocks * share // shares, blocks * (share + 1) // shares):
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
                    for n in range(BLOCK):  # no slices, see `down._keep_row`
                        in_place[place + n] = memory[at + n]
    if config is not None:
        release()
