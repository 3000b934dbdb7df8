"""The sampler of the GPU backend: logits stay on the device, tokens come back."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.triton.sampling import DrawRows, draw_tokens, normalisers
from engine.logits import LogitEdits, edits_logits
from engine.sampler import SampledToken, Sampler, SamplingRow, UnusableLogits, draw_parameters


class TritonSampler(Sampler):
    """`Sampler` on the device: the same order of things, the same tokens for the same logits.

    Drawing waits for the device once, for the tokens; `logit_bias`, penalties and `min_tokens` once more, for the few
    logits that they change; log-probabilities once more.
    """

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """See `Sampler.sample`."""
        if logits.ndim != 2 or logits.shape[0] != len(rows):
            raise ValueError(f"logits of shape {tuple(logits.shape)} do not fit {len(rows)} rows")
        if not rows:
            return []
        raw = logits.detach().float().contiguous()
        parameters = draw_parameters(rows, raw.shape[1])
        drawn = draw_tokens(_edit(raw, rows), DrawRows.make(parameters, raw.device))
        token_ids = drawn.cpu().numpy()
        if token_ids.min() < 0:
            raise UnusableLogits(np.flatnonzero(token_ids < 0).tolist())
        return _with_logprobs(raw, token_ids, rows)


def score_tokens(logits: Tensor, token_ids: Tensor) -> NDArray[np.float32]:
    """Log-probability of one token per row, as `engine.scorer.score_tokens`, of logits on the device."""
    if logits.ndim != 2 or token_ids.shape != logits.shape[:1]:
        raise ValueError(f"logits of shape {tuple(logits.shape)} do not fit {tuple(token_ids.shape)} tokens")
    raw = logits.detach().float().contiguous()
    chosen = raw.gather(1, token_ids.to(raw.device)[:, None])[:, 0].cpu().numpy()
    return _minus(chosen, _log_sum_exp(raw))


def _edit(raw: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Logits after bias, penalties and `min_tokens`: a copy if a row has any of these."""
    edited = [i for i, row in enumerate(rows) if edits_logits(row.params, len(row.output_token_ids))]
    if not edited:
        return raw
    unusable = normalisers(raw)[0].isnan().cpu().numpy()  # now, for a mask may hide a NaN
    if unusable.any():
        raise UnusableLogits(np.flatnonzero(unusable).tolist())
    vocab = raw.shape[1]
    edits = [
        rows[i].edits or LogitEdits(rows[i].params, rows[i].prompt_token_ids, rows[i].end_token_ids) for i in edited
    ]
    touched = [one.touched(rows[i].output_token_ids, vocab) for i, one in zip(edited, edits, strict=True)]
    places = torch.from_numpy(np.concatenate([i * vocab + ids for i, ids in zip(edited, touched, strict=True)]))
    places = places.to(raw.device)
    values = raw.view(-1)[places].cpu().numpy()
    row_of_logits, start = np.empty(vocab, np.float32), 0
    for i, one, ids in zip(edited, edits, touched, strict=True):
        own = slice(start, start + len(ids))
        row_of_logits[ids] = values[own]
        one.apply(row_of_logits, rows[i].output_token_ids)
        values[own] = row_of_logits[ids]
        start = own.stop
    logits = raw.clone()
    logits.view(-1)[places] = torch.from_numpy(values).to(raw.device)
    return logits


def _with_logprobs(raw: Tensor, token_ids: NDArray[np.int64], rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Tokens with the log-probabilities that their requests want."""
    tokens = [SampledToken(int(token_id)) for token_id in token_ids]
    wanted = {i: row.params.logprobs for i, row in enumerate(rows) if row.params.logprobs is not None}
    if not wanted:
        return tokens
    some = raw[list(wanted)]
    totals = _log_sum_exp(some)
    most = min(max(wanted.values()), raw.shape[1])
    # Sorted as a whole: `topk` promises no order among equals.
    best = some.sort(dim=1, descending=True, stable=True) if most else None
    best_logits, best_ids = (part[:, :most].cpu().numpy() for part in best) if best else (None, None)
    chosen = some.gather(1, torch.from_numpy(token_ids[list(wanted)]).to(raw.device)[:, None])[:, 0].cpu().numpy()
    logprobs = _minus(chosen, totals)
    for line, (i, count) in enumerate(wanted.items()):
        top: list[tuple[int, float]] = []
        if best_logits is not None and best_ids is not None:
            ids, logits = best_ids[line, :count], best_logits[line, :count]
            # Impossible tokens are no alternatives, and JSON has no number for their log-probability.
            pairs = zip(ids, _minus(logits, totals[line]), logits > -np.inf, strict=True)
            top = [(int(token_id), float(logprob)) for token_id, logprob, possible in pairs if possible]
        tokens[i] = SampledToken(int(token_ids[i]), float(logprobs[line]), top)
    return tokens


def _log_sum_exp(raw: Tensor) -> NDArray[np.float64]:
    """log(sum(exp(row))) of every row; NaN where a row is unusable."""
    maxima, masses = (part.cpu().numpy() for part in normalisers(raw))
    return maxima.astype(np.float64) + np.log(masses)


def _minus(logits: NDArray[np.float32], totals: NDArray[np.float64] | np.float64) -> NDArray[np.float32]:
    difference: NDArray[np.float32] = (logits.astype(np.float64) - totals).astype(np.float32)
    return difference
