"""A gated feed-forward block on a GPU: copies of the weights, and both sides.

Copies are visited in turn, as a step visits its layers, so that weights come from memory and not from a cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bench.ffn_block import Shape, Weights
from engine.activation import apply_activation
from engine.ffn_probe import relu_rows
from engine.kernels.triton.feed_forward import feed_forward, scratch_bytes
from engine.kernels.triton.linear import Workspace

MEMORY_BYTES = 500_000_000  # of weights that are visited before one comes again; caches have up to 126 MB


def copies_for(shape: Shape) -> int:
    """How many copies of the bfloat16 weights are larger than a cache."""
    return -(-MEMORY_BYTES // (2 * shape.weights))


class TorchFusedBlock:
    """PyTorch's dense block with gate and up in one product, as many servers have it; bfloat16.

    Args:
        weights: The values of all copies.
        copies: How many.
    """

    def __init__(self, weights: Weights, copies: int) -> None:
        both = torch.cat((weights.gate, weights.up))
        self._both = both.expand(copies, -1, -1).contiguous()
        self._down = weights.down.t().expand(copies, -1, -1).contiguous()

    @torch.inference_mode()
    def sweep(self, x: Tensor) -> Tensor:
        """Every copy with its own rows, bfloat16 [copies, rows, hidden], to the last one's output."""
        for own, both, down in zip(x, self._both, self._down, strict=True):
            gate, up = functional.linear(own, both).chunk(2, dim=-1)
            out = functional.linear(functional.silu(gate) * up, down)
        return out


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a sweep of the engine's block gave.

    Attributes:
        out: float32 [rows, hidden], of the last copy.
        zeros: Share of act(gate) that was exactly 0, in [0, 1].
    """

    out: Tensor
    zeros: float


class TritonBlock:
    """The block in the engine's own kernels, RELU rows.

    Args:
        weights: The values of all copies.
        copies: How many.
        rows: Token rows at once.
    """

    def __init__(self, weights: Weights, copies: int, rows: int) -> None:
        self.gate, self.up, self.down = (
            weight.expand(copies, -1, -1).contiguous() for weight in (weights.gate, weights.up, weights.down)
        )
        device = weights.gate.device
        self._workspace = Workspace(scratch_bytes(weights.gate), device)
        self._rows = relu_rows(rows, device)
        self._out = torch.zeros(rows, weights.gate.shape[1], device=device)
        self._zeros = torch.zeros(copies, rows, dtype=torch.int64, device=device)

    @property
    def bytes(self) -> int:
        """Of one copy's weights."""
        return 3 * self.gate[0].nbytes

    def bytes_read(self, idle: float) -> float:
        """Of one copy if this share of neurons is used by no row: `gate` in full, the rest for the others."""
        return self.bytes * (1 + 2 * (1 - idle)) / 3

    def sweep(self, x: Tensor, *, sparse: bool) -> None:
        """Every copy with its own rows, bfloat16 [copies, rows, hidden]; outputs are added up."""
        for index, own in enumerate(x):
            feed_forward(
                own,
                self.gate[index],
                self.up[index],
                self.down[index],
                self._rows,
                index,
                skip_zeros=sparse,
                workspace=self._workspace,
                out=self._out,
                zeros=self._zeros[index],
            )

    def outcome(self, x: Tensor, *, sparse: bool) -> Outcome:
        """Of one sweep over the last copy's rows alone."""
        self._out.zero_()
        feed_forward(
            x[-1],
            self.gate[-1],
            self.up[-1],
            self.down[-1],
            self._rows,
            0,
            skip_zeros=sparse,
            workspace=self._workspace,
            out=self._out,
            zeros=self._zeros[-1],
        )
        return Outcome(self._out.clone(), self._zeros[-1].double().mean().item() / self.gate.shape[1])


def reference(weights: Weights, x: Tensor) -> Tensor:
    """The block by definition: x [rows, hidden] of RELU rows to float64 [rows, hidden]."""
    gate = (x.double() @ weights.gate.double().t()).float()
    activated = apply_activation(gate, relu_rows(len(x), x.device), 0).double()
    return (activated * (x.double() @ weights.up.double().t())) @ weights.down.double()
