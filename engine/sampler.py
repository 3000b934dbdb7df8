"""The sampler: from the logits of a step to one token for each sequence."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import EngineError
from engine.kernels.cpu.sampling import largest_ids, log_sum_exp_rows, sample_rows, unusable_rows
from engine.logits import LogitEdits, edits_logits
from engine.sampling_params import SamplingParams

# Below this a distribution has only its maximum left; float32 would round much less to 0, which means greedy.
_MIN_TEMPERATURE = 1e-30


class SamplingRow(NamedTuple):
    """What the sampler knows about the sequence behind one row of logits.

    Attributes:
        params: The request's sampling parameters.
        key: Philox key words, `philox.derive_key(seed, sample_index)`.
        position: Index in the sequence of the token that is drawn.
        prompt_token_ids: The prompt.
        output_token_ids: The tokens generated so far.
        end_token_ids: End-of-sequence and stop tokens, impossible before `params.min_tokens` output tokens.
        edits: `LogitEdits` of this sequence, kept from step to step so that penalties need not count its tokens anew;
            None makes them when needed.
    """

    params: SamplingParams
    key: tuple[int, int]
    position: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    end_token_ids: tuple[int, ...] = ()
    edits: LogitEdits | None = None


class SampledToken(NamedTuple):
    """A drawn token.

    Attributes:
        token_id: The token.
        logprob: Its log-probability under the model's own distribution, before all sampling parameters; None if
            the request wants none.
        top: The most likely tokens as (id, logprob), best first, the lower id first among equals; None likewise.
    """

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


class DrawParameters(NamedTuple):
    """How each of some rows draws its token, as arrays; see `engine.kernels.cpu.sampling.sample_rows`."""

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    keys: NDArray[np.uint32]
    positions: NDArray[np.int64]


class UnusableLogits(EngineError):
    """Rows of logits from which no token can be drawn. `rows` are their indices; the other rows are good."""

    def __init__(self, rows: Sequence[int]) -> None:
        names = ", ".join(str(row) for row in rows)
        super().__init__(f"no token can be drawn from row(s) {names}: a logit is NaN or +inf, or no token is possible")
        self.rows = tuple(rows)


class Sampler:
    """Draws tokens, each row with its own parameters and independent of the other rows.

    In this order: `logit_bias`, penalties, `min_tokens`, `temperature`, `top_k`, `top_p` within what `top_k` left,
    `min_p`; then Gumbel-max with noise from Philox, a function of key, position and token id. Temperature 0 takes the
    most likely token, the lowest id among equals.
    """

    def __init__(self) -> None:
        self._parameters = _KeptParameters()

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Draw the next token of every row.

        Args:
            logits: [rows, vocabulary], float32 or bfloat16, on any device; not changed.
            rows: As many as `logits` has.

        Returns:
            One token per row. A row's result has the same bits whatever other rows there are.

        Raises:
            UnusableLogits: Some rows have no distribution. Nothing was drawn.
            ValueError: Shapes do not match.
        """
        if logits.ndim != 2 or logits.shape[0] != len(rows):
            raise ValueError(f"logits of shape {tuple(logits.shape)} do not fit {len(rows)} rows")
        if not rows:
            return []
        raw = _as_array(logits)
        token_ids = _draw(_edit(raw, rows), self._parameters.of(rows, raw.shape[1]))
        return _with_logprobs(raw, token_ids, rows)


def _as_array(logits: Tensor) -> NDArray[np.float32]:
    """Contiguous float32; the tensor's own memory where it is that already, without a call of torch too many."""
    if logits.dtype is not torch.float32 or logits.device.type != "cpu" or logits.requires_grad:
        logits = logits.detach().to("cpu", torch.float32)
    return np.ascontiguousarray(logits.numpy())


def _edit(raw: NDArray[np.float32], rows: Sequence[SamplingRow]) -> NDArray[np.float32]:
    """Logits after bias, penalties and `min_tokens`: a copy if a row has any of these."""
    edited = [i for i, row in enumerate(rows) if edits_logits(row.params, len(row.output_token_ids))]
    if not edited:
        return raw
    _check(raw)  # now, for a mask may hide a NaN
    logits = raw.copy()
    for i in edited:
        row = rows[i]
        edits = row.edits or LogitEdits(row.params, row.prompt_token_ids, row.end_token_ids)
        edits.apply(logits[i], row.output_token_ids)
    return logits


def _check(logits: NDArray[np.float32]) -> None:
    unusable = np.empty(len(logits), np.bool_)
    unusable_rows(logits, unusable)
    if unusable.any():
        raise UnusableLogits(np.flatnonzero(unusable).tolist())


def draw_parameters(rows: Sequence[SamplingRow], vocab_size: int) -> DrawParameters:
    """What the kernels that draw take, of every row."""
    params = [row.params for row in rows]
    return DrawParameters(
        temperature=np.array(
            [max(p.temperature, _MIN_TEMPERATURE) if p.temperature > 0 else 0.0 for p in params], np.float32
        ),
        top_k=np.array([min(p.top_k, vocab_size) for p in params], np.int64),
        top_p=np.array([p.top_p for p in params], np.float64),
        min_p=np.array([p.min_p for p in params], np.float64),
        keys=np.array([row.key for row in rows], np.uint32),
        positions=np.array([row.position for row in rows], np.int64),
    )


class _KeptParameters:
    """`draw_parameters` of the same requests step after step: only positions are new."""

    def __init__(self) -> None:
        self._requests: list[tuple[SamplingParams, tuple[int, int]]] = []
        self._vocab_size = 0
        self._parameters = draw_parameters([], 0)

    def of(self, rows: Sequence[SamplingRow], vocab_size: int) -> DrawParameters:
        """The parameters, valid until the next call."""
        requests = [(row.params, row.key) for row in rows]
        if requests == self._requests and vocab_size == self._vocab_size:
            self._parameters.positions[:] = [row.position for row in rows]
        else:
            self._parameters = draw_parameters(rows, vocab_size)
            self._requests, self._vocab_size = requests, vocab_size
        return self._parameters


def _draw(logits: NDArray[np.float32], parameters: DrawParameters) -> list[int]:
    """The drawn token of every row."""
    drawn = np.empty(len(logits), np.int64)
    sample_rows(logits, *parameters, drawn)
    token_ids: list[int] = drawn.tolist()
    if min(token_ids) < 0:
        raise UnusableLogits([row for row, token_id in enumerate(token_ids) if token_id < 0])
    return token_ids


def _with_logprobs(
    raw: NDArray[np.float32], token_ids: Sequence[int], rows: Sequence[SamplingRow]
) -> list[SampledToken]:
    """Tokens with the log-probabilities that their requests want."""
    tokens = [SampledToken(token_id) for token_id in token_ids]
    wanted = {i: row.params.logprobs for i, row in enumerate(rows) if row.params.logprobs is not None}
    if not wanted:
        return tokens
    normalisers = np.empty(len(wanted), np.float64)
    log_sum_exp_rows(raw, np.array(list(wanted), np.int64), normalisers)
    for (i, num_top), normaliser in zip(wanted.items(), normalisers, strict=True):
        chosen = tokens[i].token_id
        tokens[i] = SampledToken(
            chosen, _logprob(raw[i, chosen], normaliser), _top(raw[i], num_top, normaliser) if num_top else []
        )
    return tokens


def _logprob(logit: np.float32, normaliser: np.float64) -> float:
    return float(np.float32(logit - normaliser))


def _top(row: NDArray[np.float32], count: int, normaliser: np.float64) -> list[tuple[int, float]]:
    token_ids = largest_ids(row, min(count, row.size))
    logits = row[token_ids]
    best = np.lexsort((token_ids, -logits))[:count]
    # Impossible tokens are no alternatives, and JSON has no number for their log-probability.
    return [(int(token_ids[i]), _logprob(logits[i], normaliser)) for i in best if logits[i] > -np.inf]
