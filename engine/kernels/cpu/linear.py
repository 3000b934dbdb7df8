"""Token rows and a layer's matrices: rows are normalised and laid out once, then multiplied, 32 neurons at a time.

While there are few rows the calling thread lays them out alone. Products are cut by neurons, never along a sum that
could then depend on the number of threads.
"""

import numpy as np
from numba import njit, prange

import engine.kernels.cpu.integer
import engine.kernels.cpu.integer_plain  # noqa: F401
from engine.kernels.cpu.options import FEW_ROWS, OPTIONS
from engine.kernels.cpu.product import BLOCK, TOKEN_ROWS, pack_row, pack_tile, product
from engine.kernels.cpu.rows import add_chunk
from engine.kernels.cpu.simd import dot
from engine.kernels.cpu.tiles import ROWS, configure, release

TILES = 2048  # floats of a thread's memory for stored tiles


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
