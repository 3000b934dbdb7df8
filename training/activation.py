"""Stochastic activations inside transformers' models, with gradients.

A gated feed-forward block of transformers computes `down(act_fn(gate(x)) * up(x))`. `install` replaces each `act_fn`.
The definition is `engine.activation.apply_activation`; here the draws come from PyTorch's generators, since training
needs no bits that a request could ask for again, and each sequence of a batch has a p of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine import PositiveBranch
from training.errors import UnsupportedModel

ACTIVATION_NAMES = ("act_fn", "activation_fn")  # attribute names of gated blocks in transformers
SILU_NAMES = ("silu", "swish")


class _Activate(torch.autograd.Function):
    """act(gate), with an L1 pressure whose gradient joins in the backward pass.

    An L1 term that is summed up outside would lose its graph under gradient checkpointing.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, keep: Tensor | None, silu_rows: Tensor | None, l1: Tensor | None) -> Tensor:
        """`keep` [batch, tokens, intermediate] is 1 where a value passes; `silu_rows` [batch, 1, 1], see `_act`."""
        act = _act(gate, silu_rows)
        if keep is not None:
            act = act * keep
        ctx.save_for_backward(gate, keep, silu_rows, l1)
        return act

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        gate, keep, silu_rows, l1 = ctx.saved_tensors
        if l1 is not None:
            grad = torch.addcmul(grad, l1, (gate > 0).to(gate.dtype))
        result = torch.ops.aten.silu_backward(grad, gate)
        if silu_rows is not None:
            result = torch.where((gate >= 0) & ~silu_rows, grad, result)
        if keep is not None:
            result = result * keep
        return result, None, None, None


def _act(gate: Tensor, silu_rows: Tensor | None) -> Tensor:
    """SILU; where the positive branch is the identity, `silu_rows` says which sequences keep SILU for gate >= 0."""
    if silu_rows is None:
        return functional.silu(gate)
    return torch.where((gate >= 0) & ~silu_rows, gate, functional.silu(gate))


@dataclass(frozen=True, slots=True)
class _Sequences:
    """Which sequences of a batch run with which activation; tensors lie where the model does.

    Attributes:
        silu: bool [batch, 1, 1], sequences that keep all values.
        all_silu: All do.
        relu: int64, numbers of the sequences that keep no negative value.
        drawn: int64, numbers of the sequences that draw.
        p: [drawn, 1, 1], of these.
    """

    silu: Tensor
    all_silu: bool
    relu: Tensor
    drawn: Tensor
    p: Tensor

    @classmethod
    def of(cls, p: Tensor, device: torch.device) -> "_Sequences":
        silu, draws = p >= 1, (p > 0) & (p < 1)
        return cls(
            silu=silu.view(-1, 1, 1).to(device),
            all_silu=bool(silu.all()),
            relu=(p == 0).nonzero().flatten().to(device),
            drawn=draws.nonzero().flatten().to(device),
            p=p[draws].view(-1, 1, 1).to(device),
        )


class ActivationControl:
    """What the activations of one model do in the next forward pass.

    Attributes:
        zeros: float64 [layers], zeros that RELU sequences had since `reset_counts`.
        elements: Gate values of each layer that were counted.
    """

    def __init__(self, num_layers: int, positive_branch: PositiveBranch, device: torch.device) -> None:
        self.positive_branch = positive_branch
        self.zeros = torch.zeros(num_layers, dtype=torch.float64, device=device)
        self.elements = torch.zeros(num_layers, dtype=torch.float64)
        self._sequences: _Sequences | None = None
        self._seed = 0
        self._l1: Tensor | None = None

    def reset_counts(self) -> None:
        """Forget all counts."""
        self.zeros.zero_()
        self.elements.zero_()

    @contextmanager
    def running(self, p: Tensor | None, seed: int, l1: float = 0.0) -> Iterator[None]:
        """Set the activations of the forward passes, and their backward passes, inside this context.

        Args:
            p: [batch] on the CPU; 1 is SILU, 0 is RELU. None is SILU for all, without any cost.
            seed: Of the draws; the same seed gives the same draws, so that recomputed layers repeat theirs.
            l1: Weight of mean(|act(gate)|) over tokens and neurons, summed over layers, in RELU sequences.
        """
        device = self.zeros.device
        self._seed = seed
        self._sequences = None if p is None else _Sequences.of(p, device)
        self._l1 = ((p == 0).float() * l1).view(-1, 1, 1).to(device) if l1 and p is not None else None
        try:
            yield
        finally:
            self._sequences = self._l1 = None

    def apply(self, gate: Tensor, layer: int) -> Tensor:
        """act(gate) for gate [batch, tokens, intermediate]."""
        sequences = self._sequences
        if sequences is None:
            return functional.silu(gate)
        negative = gate < 0
        self._count(negative, sequences, layer)
        l1 = None
        if self._l1 is not None and gate.requires_grad:
            l1 = (self._l1 / gate.numel()).to(gate.dtype)
        silu_rows = sequences.silu if self.positive_branch is PositiveBranch.IDENTITY else None
        return _Activate.apply(gate, self._keep(negative, sequences, layer), silu_rows, l1).to(gate.dtype)  # type: ignore[no-any-return, no-untyped-call]

    def _keep(self, negative: Tensor, sequences: _Sequences, layer: int) -> Tensor | None:
        if sequences.all_silu:
            return None
        keep = ~negative | sequences.silu
        if len(sequences.drawn):
            generator = torch.Generator(keep.device).manual_seed((self._seed * 8191 + layer) % 2**63)
            draws = torch.rand((len(sequences.drawn), *keep.shape[1:]), generator=generator, device=keep.device)
            keep[sequences.drawn] |= draws < sequences.p
        return keep

    @torch.no_grad()
    def _count(self, negative: Tensor, sequences: _Sequences, layer: int) -> None:
        if len(sequences.relu):
            self.zeros[layer] += negative[sequences.relu].sum()
            self.elements[layer] += len(sequences.relu) * negative[0].numel()


class ControlledActivation(nn.Module):
    """Stands where a feed-forward block of transformers had its SILU."""

    def __init__(self, control: ActivationControl, layer: int) -> None:
        super().__init__()
        self._control = control
        self._layer = layer

    def forward(self, gate: Tensor) -> Tensor:
        """act(gate)."""
        return self._control.apply(gate, self._layer)


def install(model: nn.Module, positive_branch: PositiveBranch) -> ActivationControl:
    """Replace the activation of every gated feed-forward block.

    Args:
        model: A causal language model of transformers.
        positive_branch: What stochastic and RELU modes compute for gate values >= 0.

    Returns:
        What sets the activations of each forward pass.

    Raises:
        UnsupportedModel: It has no gated block with SILU, or has experts, which run on tokens of mixed sequences.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    name = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if name not in SILU_NAMES:
        raise UnsupportedModel(f"the model's activation is {name!r}; stochastic activations are defined for SILU")
    if any(module_name.split(".")[-1] == "experts" for module_name, _ in model.named_modules()):
        raise UnsupportedModel(
            f"{type(model).__name__} has a mixture of experts; one feed-forward block a layer is needed"
        )
    blocks = [block for block in model.modules() if is_gated(block)]
    if len(blocks) != config.num_hidden_layers:
        raise UnsupportedModel(
            f"{len(blocks)} gated feed-forward blocks were found in {config.num_hidden_layers} layers of "
            f"{type(model).__name__}; one in each is needed"
        )
    device = next(model.parameters()).device
    control = ActivationControl(len(blocks), positive_branch, device)
    for layer, block in enumerate(blocks):
        setattr(block, _activation_name(block), ControlledActivation(control, layer))
    return control


def is_gated(block: nn.Module) -> bool:
    """Whether a module is `down(act(gate) * up)`, with separate or joined `gate` and `up`."""
    layers = {name for name, _ in block.named_children()}
    projections = {"gate_proj", "up_proj"} <= layers or "gate_up_proj" in layers
    return projections and "down_proj" in layers and any(hasattr(block, name) for name in ACTIVATION_NAMES)


def _activation_name(block: nn.Module) -> str:
    return next(name for name in ACTIVATION_NAMES if hasattr(block, name))
