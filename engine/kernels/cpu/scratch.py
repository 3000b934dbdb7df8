"""Memory that steps compute in, kept from one to the next."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.kernels.cpu import aligned
from engine.kernels.cpu.down import NEURON_PARTS, PANEL, PANEL_COLUMNS
from engine.kernels.cpu.feed_forward import PARTS, step_of_parts
from engine.kernels.cpu.linear import TILES
from engine.kernels.cpu.options import FEW_ROWS
from engine.kernels.cpu.product import BLOCK, TOKEN_ROWS
from engine.kernels.cpu.team import make_progress
from engine.kernels.cpu.tiles import ROWS
from engine.models.config import DecoderConfig

Array = NDArray[Any]


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
    progress: Array  # see `team.make_progress`: as many shares as threads


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
        progress=make_progress(threads),
    )
