"""The scorer: from logits to the log-probability of the token that is known to come next."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.cpu.sampling import log_sum_exp_rows, unusable_rows


def score_tokens(logits: Tensor, token_ids: Tensor) -> NDArray[np.float32]:
    """Log-probability of one token per row.

    Args:
        logits: [rows, vocabulary], float32 or bfloat16, on any device; not changed.
        token_ids: int64 [rows], the tokens.

    Returns:
        float32 [rows]; NaN where a logit is NaN or +inf. A row's result has the same bits whatever the other rows are.

    Raises:
        ValueError: Shapes do not match.
    """
    if logits.ndim != 2 or token_ids.shape != logits.shape[:1]:
        raise ValueError(f"logits of shape {tuple(logits.shape)} do not fit {tuple(token_ids.shape)} tokens")
    raw: NDArray[np.float32] = logits.detach().to("cpu", torch.float32).contiguous().numpy()
    unusable = np.empty(len(raw), np.bool_)
    unusable_rows(raw, unusable)
    rows = np.flatnonzero(~unusable)
    normalisers = np.empty(len(rows), np.float64)
    log_sum_exp_rows(raw, rows, normalisers)
    logprobs = np.full(len(raw), np.nan, np.float32)
    logprobs[rows] = raw[rows, token_ids.cpu().numpy()[rows]] - normalisers
    return logprobs
