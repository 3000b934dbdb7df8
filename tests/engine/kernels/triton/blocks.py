"""Small feed-forward blocks with a known share of zeros, and what they compute by definition."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.activation import Activation, ActivationMode, ActivationRows, PositiveBranch, apply_activation
from tests.engine.kernels.kinds import normal
from tests.engine.kernels.triton.devices import DEVICE
from tests.engine.steps import activation_rows

RELU = Activation(ActivationMode.RELU)
MIXTURE = [
    Activation(),
    *(Activation(ActivationMode.STOCHASTIC, p=p, seed=seed) for seed, p in enumerate((0, 0.3, 1))),
    RELU,
]


@dataclass(frozen=True)
class Block:
    """Weights [intermediate, hidden] and token rows [rows, hidden]."""

    x: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    def expected(self, rows: ActivationRows, layer: int) -> tuple[Tensor, Tensor]:
        """Output and zeros by the definition of the activation, in float64 but for the activation itself."""
        gate = (self.x.double() @ self.gate.double().t()).float().cpu()
        activated = apply_activation(gate, rows, layer)
        hidden = activated.double() * (self.x.double() @ self.up.double().t()).cpu()
        return hidden @ self.down.double().cpu(), (activated == 0).sum(-1)


def make_block(rows: int, hidden: int, intermediate: int, dtype: torch.dtype, zeros: float = 0.5) -> Block:
    """A block in which a RELU row has about this share of zeros, and exactly all or none for 1 and 0."""
    x = normal(rows, hidden, seed=1)
    x[:, 0] = 4
    gate, up = (normal(intermediate, hidden, seed=seed, scale=hidden**-0.5) for seed in (2, 3))
    shift = {0.0: 10.0, 1.0: -10.0}.get(zeros)
    gate[:, 0] = -torch.special.ndtri(torch.tensor(zeros)).item() / 4 if shift is None else shift
    down = normal(intermediate, hidden, seed=4, scale=intermediate**-0.5)
    return Block(*(tensor.to(DEVICE, dtype) for tensor in (x, gate, up, down)))


def mixed_rows(count: int, branch: PositiveBranch = PositiveBranch.SILU) -> ActivationRows:
    """Rows of all modes in turn."""
    return activation_rows(
        [MIXTURE[row % len(MIXTURE)] for row in range(count)], [7 * row for row in range(count)], branch
    )


def relu_rows(count: int, branch: PositiveBranch = PositiveBranch.SILU) -> ActivationRows:
    """RELU rows."""
    return activation_rows([RELU] * count, range(count), branch)
