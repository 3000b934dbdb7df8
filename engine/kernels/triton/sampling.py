"""Kernels that draw one token per row of logits: the tokens of `engine.kernels.cpu.sampling` for the same logits.

The same arithmetic, exp and log included, without fused multiply-add, so that scores are equal to the last bit; see
there for what `top_k`, `top_p` and `min_p` mean and how they become one minimum logit. Only the float64 mass of a
nucleus is added up in another order, fixed here too; that moves it by some 1e-16 of itself, and a token across its edge
all but never.

Nothing of a row depends on the other rows: a row has its own programs, and where several of them look at parts of its
vocabulary, what they hand on is a maximum, which has no order.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.cpu import sampling as cpu
from engine.kernels.cpu import simd
from engine.kernels.triton.linear import check
from engine.kernels.triton.philox import random_words, uniform
from engine.philox import STREAM_SAMPLING
from engine.sampler import DrawParameters

CHUNK = 4096  # tokens that a program which sees a whole row looks at together
SCORED = 1024  # tokens that one program draws noise for

_STREAM = tl.constexpr(STREAM_SAMPLING)
_E0, _E1, _E2, _E3, _E4, _E5 = (tl.constexpr(float(term)) for term in simd.EXP_TERMS)
_LOG2_E, _MIN_EXPONENT = tl.constexpr(float(simd.LOG2_E)), tl.constexpr(float(simd.MIN_EXPONENT))
_EXP_LN2_HIGH, _EXP_LN2_LOW = tl.constexpr(float(simd.LN2_HIGH)), tl.constexpr(float(simd.LN2_LOW))
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = (tl.constexpr(float(term)) for term in cpu.LOG_TERMS)
_LOG_LN2_HIGH, _LOG_LN2_LOW = tl.constexpr(float(cpu.LN2_HIGH)), tl.constexpr(float(cpu.LN2_LOW))
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_LOWEST_KEY, _INF_KEY = tl.constexpr(-0x7F800001), tl.constexpr(0x7F800000)  # order keys of -inf and +inf


@dataclass(frozen=True, slots=True)
class DrawRows:
    """How each row draws its token.

    Attributes:
        inverse: float32 [rows], 1 / temperature; 0 is greedy.
        top_k: int64 [rows], in [0, vocabulary]; 0 keeps all tokens.
        top_p: float64 [rows], in (0, 1].
        log_min_p: float64 [rows], logarithm of `min_p`; -inf keeps all tokens.
        keys: int64 [rows, 2], Philox key words.
        positions: int64 [rows], position in the sequence of the token that is drawn.
    """

    inverse: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor
    keys: Tensor
    positions: Tensor

    @classmethod
    def make(cls, parameters: DrawParameters, device: torch.device) -> "DrawRows":
        """On the device, by two copies."""
        temperature = parameters.temperature
        with np.errstate(divide="ignore"):
            inverse = np.where(temperature > 0, np.float32(1) / temperature, np.float32(0))
            log_min_p = np.log(parameters.min_p)
        count = len(temperature)
        # An even number of 8 bytes each: kernels are compiled anew for memory that begins elsewhere.
        reals = np.zeros((3, count + count % 2), np.float64)
        integers = np.zeros((4, count + count % 2), np.int64)
        reals[:, :count] = inverse, parameters.top_p, log_min_p
        integers[:, :count] = parameters.top_k, parameters.positions, *parameters.keys.T
        on_device, whole = torch.from_numpy(reals).to(device), torch.from_numpy(integers).to(device)
        return cls(
            inverse=on_device[0, :count].float(),
            top_k=whole[0, :count],
            top_p=on_device[1, :count],
            log_min_p=on_device[2, :count],
            keys=whole[2:, :count].T.contiguous(),
            positions=whole[1, :count],
        )


def draw_tokens(logits: Tensor, rows: DrawRows) -> Tensor:
    """Draw a token for every row: greedy, or Gumbel-max among what `top_k`, `top_p` and `min_p` leave.

    Args:
        logits: float32 [rows, vocab], contiguous; -inf for impossible tokens.
        rows: As many as `logits` has.

    Returns:
        int64 [rows]; -1 where a logit is NaN or +inf, or all are -inf.

    Raises:
        ValueError: A shape, type or layout is not as above.
    """
    count, vocab = logits.shape
    check("logits", logits, (count, vocab), (torch.float32,))
    shapes = {"keys": (count, 2)}
    for field in fields(rows):
        if getattr(rows, field.name).shape != shapes.get(field.name, (count,)):
            raise ValueError(f"{field.name} must have one entry for each of {count} rows")
    token_ids = torch.empty(count, dtype=torch.int64, device=logits.device)
    if count == 0:
        return token_ids
    chunks = triton.cdiv(vocab, SCORED)
    bounds = torch.empty(count, 2, dtype=torch.float32, device=logits.device)
    best = torch.empty(count, chunks, dtype=torch.float32, device=logits.device)
    best_ids = torch.empty(count, chunks, dtype=torch.int64, device=logits.device)
    _bounds[(count,)](
        logits,
        rows.inverse,
        rows.top_k,
        rows.top_p,
        rows.log_min_p,
        bounds,
        vocab,
        CHUNK=CHUNK,
        num_warps=8,
        enable_fp_fusion=False,
    )
    _score[(count, chunks)](
        logits,
        rows.inverse,
        rows.keys,
        rows.positions,
        bounds,
        best,
        best_ids,
        vocab,
        chunks,
        SCORED=SCORED,
        num_warps=4,
        enable_fp_fusion=False,
    )
    _choose[(count,)](bounds, best, best_ids, token_ids, chunks, CHUNKS=triton.next_power_of_2(chunks), num_warps=1)
    return token_ids


def normalisers(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What log(sum(exp(row))) is made of: maximum + log(mass).

    Args:
        logits: float32 [rows, vocab], contiguous.

    Returns:
        The maxima, float32 [rows], NaN where a logit is NaN or +inf or all are -inf, and float64 [rows], the sums of
        exp(logit - maximum).

    Raises:
        ValueError: A shape, type or layout is not as above.
    """
    count, vocab = logits.shape
    check("logits", logits, (count, vocab), (torch.float32,))
    maxima = torch.empty(count, dtype=torch.float32, device=logits.device)
    masses = torch.empty(count, dtype=torch.float64, device=logits.device)
    if count:
        _normalisers[(count,)](logits, maxima, masses, vocab, CHUNK=CHUNK, num_warps=8, enable_fp_fusion=False)
    return maxima, masses


@triton.jit
def exp(x):  # type: ignore[no-untyped-def]
    """float32 exponential, `engine.kernels.cpu.math.exp` for x <= 0 without fused additions."""
    x = tl.maximum(x, _MIN_EXPONENT)
    n = tl.floor(x * _LOG2_E + 0.5)
    r = x - n * _EXP_LN2_HIGH - n * _EXP_LN2_LOW
    y = _E0 * r + _E1
    y = y * r + _E2
    y = y * r + _E3
    y = y * r + _E4
    y = y * r + _E5
    y = y * r * r + r + 1.0
    return y * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def log(x):  # type: ignore[no-untyped-def]
    """Logarithm of a positive normal float32, the bits of `engine.kernels.cpu.sampling.log`."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    high = _L4 + f * (_L5 + f * (_L6 + f * _L7))
    polynomial = _L0 + f * (_L1 + f * (_L2 + f * (_L3 + f * high)))
    square, power = f * f, exponent.to(tl.float32)
    return power * _LOG_LN2_HIGH + (f + (square * f * polynomial - 0.5 * square + power * _LOG_LN2_LOW))


@triton.jit
def _order_key(x):  # type: ignore[no-untyped-def]
    """An int32 that orders like the float; NaNs lie outside [key(-inf), key(+inf)]."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_order_key(key):  # type: ignore[no-untyped-def]
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _row_maximum(row, vocab, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest logit of a row; NaN if one of them is NaN or +inf, or all are -inf."""
    highest = tl.full((CHUNK,), _LOWEST_KEY, tl.int32)
    lowest = tl.full((CHUNK,), _INF_KEY, tl.int32)
    for start in range(0, vocab, CHUNK):
        at = start + tl.arange(0, CHUNK)
        key = _order_key(tl.load(row + at, mask=at < vocab, other=0.0))
        highest = tl.where(at < vocab, tl.maximum(highest, key), highest)
        lowest = tl.where(at < vocab, tl.minimum(lowest, key), lowest)
    top, bottom = tl.max(highest, 0), tl.min(lowest, 0)
    unusable = (top >= _INF_KEY) | (top == _LOWEST_KEY) | (bottom < _LOWEST_KEY)
    return tl.where(unusable, float("nan"), _from_order_key(top))


@triton.jit
def _count(row, vocab, minimum, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Number of logits >= minimum."""
    total = tl.full((CHUNK,), 0, tl.int32)
    for start in range(0, vocab, CHUNK):
        at = start + tl.arange(0, CHUNK)
        logit = tl.load(row + at, mask=at < vocab, other=0.0)
        total += ((logit >= minimum) & (at < vocab)).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _mass(row, vocab, maximum, inverse, minimum, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """float64 sum of exp((logit - maximum) * inverse) over logits >= minimum.

    Lane i adds tokens i, i + CHUNK, ...; then a tree over the lanes.
    """
    total = tl.full((CHUNK,), 0.0, tl.float64)
    for start in range(0, vocab, CHUNK):
        at = start + tl.arange(0, CHUNK)
        logit = tl.load(row + at, mask=at < vocab, other=0.0)
        weight = exp((logit - maximum) * inverse)
        total += tl.where((logit >= minimum) & (at < vocab), weight, 0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _kth_largest(row, vocab, k, maximum, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A minimum that keeps the k largest logits and what equals the smallest of them, by bisection over order keys."""
    low = tl.full((), _LOWEST_KEY, tl.int64)
    high = _order_key(maximum).to(tl.int64) + 1
    while high - low > 1:  # low keeps at least k logits, high fewer
        middle = (low + high) >> 1
        count = _count(row, vocab, _from_order_key(middle), CHUNK)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count == k, middle + 1, tl.where(count > k, high, middle))
    return _from_order_key(low)


@triton.jit
def _nucleus(row, vocab, top_p, maximum, inverse, minimum, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The minimum that keeps the most likely of the logits >= minimum whose mass reaches `top_p` of theirs."""
    target = top_p * _mass(row, vocab, maximum, inverse, minimum, CHUNK)
    low = _order_key(minimum).to(tl.int64)
    high = _order_key(maximum).to(tl.int64) + 1
    while high - low > 1:  # low keeps enough mass, high does not
        middle = (low + high) >> 1
        enough = _mass(row, vocab, maximum, inverse, _from_order_key(middle), CHUNK) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return _from_order_key(low)


@triton.jit(do_not_specialize=["vocab"])
def _bounds(logits, inverses, top_ks, top_ps, log_min_ps, bounds, vocab, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program r: largest and smallest logit that row r may draw. Reads the row once, and some 32 times for a filter."""
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * vocab
    inverse, top_k = tl.load(inverses + r), tl.load(top_ks + r)
    top_p, log_min_p = tl.load(top_ps + r), tl.load(log_min_ps + r)
    maximum = _row_maximum(row, vocab, CHUNK)
    minimum = tl.full((), float("-inf"), tl.float32)
    if (inverse > 0) & (maximum == maximum):
        if (top_k > 0) & (top_k < vocab):
            minimum = _kth_largest(row, vocab, top_k, maximum, CHUNK)
        if top_p < 1.0:
            minimum = tl.maximum(minimum, _nucleus(row, vocab, top_p, maximum, inverse, minimum, CHUNK))
        if log_min_p > float("-inf"):
            minimum = tl.maximum(minimum, (maximum.to(tl.float64) + log_min_p / inverse.to(tl.float64)).to(tl.float32))
    tl.store(bounds + r * 2, maximum)
    tl.store(bounds + r * 2 + 1, minimum)


@triton.jit(do_not_specialize=["vocab", "chunks"])
def _score(  # type: ignore[no-untyped-def]
    logits, inverses, keys, positions, bounds, best, best_ids, vocab, chunks, SCORED: tl.constexpr
):
    """Program (r, c): best token of row r among those of chunk c, the lowest id among equals.

    Scores are logits where the row is greedy, else logit / temperature - log(-log(u)): Gumbel-max, relative to the
    maximum, so that a tiny temperature cannot overflow the winner.
    """
    r, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * SCORED + tl.arange(0, SCORED)
    logit = tl.load(logits + r * vocab + at, mask=at < vocab, other=float("-inf"))
    inverse = tl.load(inverses + r)
    maximum, minimum = tl.load(bounds + r * 2), tl.load(bounds + r * 2 + 1)
    score = logit
    if inverse > 0:
        line = tl.arange(0, 1)
        words = random_words(
            tl.load(keys + r * 2 + line),
            tl.load(keys + r * 2 + 1 + line),
            tl.load(positions + r + line),
            0,
            chunk * SCORED,
            _STREAM,
            SCORED,
        )
        noise = log(-log(tl.reshape(uniform(words), (SCORED,))))
        score = (logit - maximum) * inverse - noise
    score = tl.where((logit >= minimum) & (at < vocab), score, float("-inf"))
    highest, index = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + r * chunks + chunk, highest)
    tl.store(best_ids + r * chunks + chunk, (chunk * SCORED + index).to(tl.int64))


@triton.jit(do_not_specialize=["chunks"])
def _choose(bounds, best, best_ids, token_ids, chunks, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program r: the best of row r's chunks, the first among equals."""
    r = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    scores = tl.load(best + r * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    _, index = tl.max(scores, 0, return_indices=True, return_indices_tie_break_left=True)
    maximum = tl.load(bounds + r * 2)
    token = tl.load(best_ids + r * chunks + index)
    tl.store(token_ids + r, tl.where(maximum == maximum, token, -1))


@triton.jit(do_not_specialize=["vocab"])
def _normalisers(logits, maxima, masses, vocab, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program r: of row r."""
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * vocab
    maximum = _row_maximum(row, vocab, CHUNK)
    tl.store(maxima + r, maximum)
    tl.store(masses + r, _mass(row, vocab, maximum, 1.0, float("-inf"), CHUNK))
