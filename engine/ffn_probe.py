"""Gates and token rows whose products have a known share of negative values, to measure the feed-forward with."""

import statistics

import torch
from torch import Tensor

from engine.activation import MODE_CODE, NEVER_SILU, ActivationMode, ActivationRows, PositiveBranch


def make_gate(like: Tensor, zeros: float, generator: torch.Generator) -> Tensor:
    """A gate of the shape of `like` whose products with `make_rows` are normal, the wanted share of them negative."""
    gate: Tensor = torch.randn(like.shape, generator=generator, device=like.device) / like.shape[1] ** 0.5
    gate[:, 0] = -statistics.NormalDist().inv_cdf(zeros)
    return gate.to(like.dtype)


def make_rows(like: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Token rows for weights like these, independent of each other: 1, then noise."""
    x = torch.randn(count, like.shape[1], generator=generator, device=like.device)
    x[:, 0] = 1
    return x.to(like.dtype)


def relu_rows(count: int, device: torch.device) -> ActivationRows:
    """Rows in RELU mode."""
    zeros = torch.zeros(count, dtype=torch.int64, device=device)
    return ActivationRows(
        mode=torch.full_like(zeros, MODE_CODE[ActivationMode.RELU]),
        threshold=torch.full_like(zeros, NEVER_SILU),
        keys=torch.zeros(count, 2, dtype=torch.int64, device=device),
        positions=zeros,
        positive_branch=PositiveBranch.SILU,
    )
