"""Memory that steps compute in, kept from one to the next."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.kernels.cpu import aligned
from engine.kernels.cpu.down import NEURON_PARTS, PANEL, PANEL_COLUMNS
from engine.kernels.cpu.layers import PARTS, TILES, Scratch, step_of_parts
from engine.kernels.cpu.options import FEW_ROWS
from engine.kernels.cpu.product import BLOCK, TOKEN_ROWS
from engine.kernels.cpu.tiles import ROWS
from engine.models.config import DecoderConfig


def widest_part(intermediate: int, parts: int) -> int:
    """Neurons of the largest part."""
    blocks = intermediate // BLOCK
    step = step_of_parts(blocks)
    return -(-(blocks // step) // parts) * step * BLOCK


def make_scratch(config: DecoderConfig, rows: int, threads: int, make_hidden: Callable[[int], Any]) -> Scratch:
    """Memory for steps of up to `rows` rows. The system hands it out when it is first written.

    Args:
        config: The decoder's shape.
        rows: Most rows of a step.
        threads: How many there are.
        make_hidden: Makes `Scratch.h` for so many values.
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    padded = -(-rows // ROWS) * ROWS
    part = widest_part(intermediate, threads)

    def floats(*shape: int) -> NDArray[np.float32]:
        return aligned.empty(shape, np.float32)

    return Scratch(
        qkv=floats(rows, config.q_size + 2 * config.kv_size),
        queries=floats(rows, config.num_heads, config.head_dim),
        attended=floats(rows, config.q_size),
        h=make_hidden(padded * intermediate),
        intermediate=intermediate,
        totals=floats(max(padded, NEURON_PARTS * ROWS) * hidden),
        partials=floats(NEURON_PARTS, FEW_ROWS * hidden),
        zeros=np.empty((max(PARTS, threads), rows), np.int64),
        kept=np.empty((max(PARTS, threads), rows), np.int64),
        neurons=np.empty(max(PARTS, threads), np.int64),
        thread=floats(threads, TILES + min(rows, TOKEN_ROWS) * (BLOCK + part)),
        words=aligned.empty((threads, max(PANEL * PANEL_COLUMNS // 2, part)), np.uint32),
        places=np.zeros((threads, intermediate + 66), np.int64),
        copies=aligned.empty((threads, 4 * BLOCK * hidden), np.uint8),
    )
