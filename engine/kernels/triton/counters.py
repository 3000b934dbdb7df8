"""Counts of the feed-forward's zeros, kept on the device and read without waiting for it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.activation import MODES
from engine.kernels.triton.linear import check
from engine.sparsity import SparsityCounters

_NUM_MODES = tl.constexpr(len(MODES))
_ROWS = 64  # that a program adds up together


class DeviceCounters(SparsityCounters):
    """`SparsityCounters` whose truth lies on the device.

    After each step the device copies all counts to the memory that readers see (pinned, if it is a GPU), in its own
    time. So readers never wait, and are behind by the steps that are still running: none, once the tokens of a step are
    known.

    Args:
        num_layers: Decoder layers.
        intermediate: Elements of a row in one layer.
        device: Where the kernels run.
    """

    def __init__(self, num_layers: int, intermediate: int, device: torch.device) -> None:
        super().__init__(num_layers)
        self._intermediate = intermediate
        self._counts = torch.zeros(2, len(MODES), num_layers, dtype=torch.int64, device=device)
        self._seen = torch.zeros_like(self._counts, device="cpu", pin_memory=device.type == "cuda")
        self.zeros, self.elements = self._seen.numpy()

    def reset(self) -> None:
        """Forget all counts."""
        self._counts.zero_()
        self._seen.copy_(self._counts)  # waits for the copies before it

    def add_rows(self, zeros: Tensor, modes: Tensor) -> None:
        """Count a step.

        Args:
            zeros: int32 [layers, capacity], contiguous; zeros of each row in each layer, in the first columns.
            modes: int64 [rows], contiguous, at most `capacity` of them: index into `MODES`; rows of another are not
                counted.

        Raises:
            ValueError: A shape, type or layout is not as above.
        """
        layers, capacity = zeros.shape
        check("zeros", zeros, (self._counts.shape[2], capacity), (torch.int32,))
        check("modes", modes, (len(modes),), (torch.int64,))
        if len(modes) > capacity:
            raise ValueError(f"modes must have at most {capacity} rows, got {len(modes)}")
        _add_rows[(layers,)](zeros, modes, self._counts, len(modes), capacity, layers, self._intermediate, BLOCK=_ROWS)
        self._seen.copy_(self._counts, non_blocking=True)


@triton.jit(do_not_specialize=["rows"])
def _add_rows(zeros, modes, counts, rows, capacity, layers, intermediate, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program l: counts [2, modes, layers] of layer l, zeros first, then elements. Integers: any order will do."""
    layer = tl.program_id(0)
    for mode in tl.static_range(_NUM_MODES):
        found = tl.full((BLOCK,), 0, tl.int64)
        of_mode = tl.full((BLOCK,), 0, tl.int64)
        for start in range(0, rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            chosen = tl.load(modes + row, mask=row < rows, other=-1) == mode
            found += tl.load(zeros + layer * capacity + row, mask=chosen, other=0).to(tl.int64)
            of_mode += chosen.to(tl.int64)
        at = counts + mode * layers + layer
        tl.store(at, tl.load(at) + tl.sum(found, 0))
        at += _NUM_MODES * layers
        tl.store(at, tl.load(at) + tl.sum(of_mode, 0) * intermediate)
