"""Inverse frequencies of the rotary position embedding."""

import math

import torch
from torch import Tensor

from engine.models.config import LinearRopeScaling, Llama3RopeScaling


def inverse_frequencies(
    head_dim: int, theta: float, scaling: Llama3RopeScaling | LinearRopeScaling | None = None
) -> Tensor:
    """Angle per position of each rotated pair, scaling applied (RoFormer, arXiv 2104.09864, equation 15).

    Args:
        head_dim: Width of a head; pair `i` joins elements `i` and `i + head_dim / 2`.
        theta: Base of the geometric series.
        scaling: How the checkpoint stretches its context.

    Returns:
        float32 [head_dim / 2], in radians per position.
    """
    # float32 throughout, in the order transformers computes it: a last-bit difference grows with the position.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / (theta**exponents)
    match scaling:
        case None:
            return inv_freq
        case LinearRopeScaling(factor):
            return inv_freq / factor
        case Llama3RopeScaling():
            return _llama3(inv_freq, scaling)


def _llama3(inv_freq: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    wavelength = 2 * math.pi / inv_freq
    long = scaling.original_max_position / scaling.low_freq_factor
    short = scaling.original_max_position / scaling.high_freq_factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / span
    between = (1 - keep) * inv_freq / scaling.factor + keep * inv_freq
    stretched = torch.where(wavelength > long, inv_freq / scaling.factor, between)
    return torch.where(wavelength < short, inv_freq, stretched)
