"""Decoding steps as recorded launches: which batch sizes are recorded, and what a replay needs.

A step in which every sequence computes one token has the same launches each time, but for its number of rows. So each
of a ladder of batch sizes is recorded once, and a step is padded to the next of them. What is recorded reads and writes
memory that stays in place; see `engine.kernels.triton.buffers` for how a step gets there.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from engine.activation import PositiveBranch

Body = Callable[[], None]
# Rows, whether zeros are skipped, what the checkpoint does with positive gate values.
Variant = tuple[int, bool, PositiveBranch]


def ladder(most: int) -> tuple[int, ...]:
    """Batch sizes to record: powers of two and `most` itself, rising.

    Padding a step costs little, for its time goes into reading weights; each recording costs time at the start.

    Raises:
        ValueError: `most` is less than 1.
    """
    if most < 1:
        raise ValueError(f"the largest batch must have at least 1 row, got {most}")
    powers = [1 << exponent for exponent in range(most.bit_length()) if 1 << exponent < most]
    return (*powers, most)


def padded(rows: int, sizes: Iterable[int]) -> int | None:
    """The least of rising `sizes` with room for `rows` rows; None if there is none."""
    return next((size for size in sizes if size >= rows), None)


class Recorder(Protocol):
    """Makes something that can be run again and again out of launches."""

    def __call__(self, body: Body) -> Body:
        """What repeats the launches of `body`, which it may run itself."""


def run_each_time(body: Body) -> Body:
    """Records nothing: each replay launches anew. For devices without graphs."""
    return body


class CudaRecorder:
    """Records CUDA graphs that share one memory pool: they run one after another, never at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Body) -> Body:
        """Run `body` once, for compiling is not possible while recording, then record it."""
        body()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            body()
        return graph.replay


class DecodeGraphs:
    """The recordings of all batch sizes and variants, made when first wanted.

    Args:
        body: Launches one decoding step on the memory of its first `rows` rows; running it twice must do no harm.
        sizes: Batch sizes, rising, see `ladder`.
        record: Records launches.
    """

    def __init__(self, body: Callable[[Variant], None], sizes: tuple[int, ...], record: Recorder) -> None:
        self._body = body
        self.sizes = sizes
        self._record = record
        self._recorded: dict[Variant, Body] = {}

    @property
    def recorded(self) -> tuple[Variant, ...]:
        """What is recorded."""
        return tuple(self._recorded)

    def prepare(self, *, skip_zeros: Iterable[bool], positive_branch: PositiveBranch) -> None:
        """Record all batch sizes, the largest first: it needs the most memory, which the others then share."""
        for size in reversed(self.sizes):
            for skip in skip_zeros:
                self._recording((size, skip, positive_branch))

    def run(self, variant: Variant) -> None:
        """Run a step of one of `sizes`."""
        self._recording(variant)()

    def _recording(self, variant: Variant) -> Body:
        if variant not in self._recorded:
            self._recorded[variant] = self._record(lambda: self._body(variant))
        return self._recorded[variant]
