"""Numba kernels that draw one token per row of logits.

One thread computes a row, in loops whose arithmetic depends on the row alone: sums have a fixed order, exp and log are
plain arithmetic without fused multiply-add. (A library's vector functions may round the last elements of an array
differently, and which ones are last depends on batch size and threads.) So a row's token has nothing to do with its
batch-mates. A row of 49,152 float32 logits is 192 KiB and stays in the second-level cache from first pass to last.

`top_k`, `top_p` and `min_p` become one minimum logit per row. The largest minimum that keeps enough tokens, or enough
probability, is found by bisection over the bit patterns of floats, at most 32 vectorised passes and no sort: exact, and
tokens with equal logits share their fate.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from engine.kernels.cpu.math import exp
from engine.kernels.cpu.philox import WORDS_PER_BLOCK, philox4x32, uniform
from engine.kernels.cpu.team import launch, usable_threads
from engine.philox import STREAM_SAMPLING

_KERNEL = {"cache": True, "nogil": True, "no_cfunc_wrapper": True}  # no fast mathematics
_INNER = {**_KERNEL, "no_cpython_wrapper": True}  # for what only kernels call

CHUNK = 1024  # tokens whose noise is drawn together: a buffer of 4 KiB; a multiple of WORDS_PER_BLOCK
LANES = 32  # partial sums of a mass; values that `_keep` rejects at once
BINS = 1024  # maxima from which a lower bound of the k-th largest value is taken

_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
_INF, _NAN = np.float32(np.inf), np.float32(np.nan)
LN2_HIGH, LN2_LOW = np.float32(0.693145751953125), np.float32(1.42860682e-6)  # the first times an exponent is exact
_SQRT_HALF_BITS = np.int32(0x3F3504F3)
_MANTISSA_BITS, _SIGN_SHIFT, _MAGNITUDE = np.int32(23), np.int32(31), np.int32(0x7FFFFFFF)
_LOWEST_KEY, _INF_KEY = np.int32(-0x7F800001), np.int32(0x7F800000)  # order keys of -inf and +inf

# log(1 + f) = f - f^2 / 2 + f^3 * L(f) on 1 + f in [sqrt(1/2), sqrt(2)]: minimax, relative error 6e-9 before rounding.
LOG_TERMS = tuple(
    np.float32(term)
    for term in (0.33333331, -0.25000820, 0.20001227, -0.16623357, 0.14201757, -0.13160183, 0.12761578, -0.076344997)
)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = LOG_TERMS


@njit(cache=True, nogil=True, forceinline=True)
def log(x: np.float32) -> np.float32:
    """Logarithm of a positive normal float32 within 1 unit in the last place, also next to 1; vectorises."""
    bits = np.float32(x).view(np.int32)
    exponent = np.int32(bits - _SQRT_HALF_BITS) >> _MANTISSA_BITS
    f = np.int32(bits - np.int32(exponent << _MANTISSA_BITS)).view(np.float32) - _ONE
    high = _L4 + f * (_L5 + f * (_L6 + f * _L7))
    polynomial = _L0 + f * (_L1 + f * (_L2 + f * (_L3 + f * high)))
    square, power = f * f, np.float32(exponent)
    return power * LN2_HIGH + (f + (square * f * polynomial - _HALF * square + power * LN2_LOW))


@njit(cache=True, nogil=True, forceinline=True)
def _order_key(x: np.float32) -> np.int32:
    """An integer that orders like the float; NaNs lie outside [key(-inf), key(+inf)].

    LLVM vectorises the maximum of integers, but not that of floats, whose NaNs it must respect.
    """
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ ((bits >> _SIGN_SHIFT) & _MAGNITUDE))


@njit(cache=True, nogil=True, forceinline=True)
def _from_order_key(key: int) -> np.float32:
    bits = np.int32(key)
    return np.int32(bits ^ ((bits >> _SIGN_SHIFT) & _MAGNITUDE)).view(np.float32)


@njit(**_INNER)
def _largest(values: NDArray[np.float32]) -> np.float32:
    """Largest value; NaN if one of them is NaN or +inf, or all are -inf."""
    highest, lowest = _LOWEST_KEY, _INF_KEY
    for i in range(values.size):
        key = _order_key(values[i])
        highest = max(highest, key)
        lowest = min(lowest, key)
    if highest >= _INF_KEY or highest == _LOWEST_KEY or lowest < _LOWEST_KEY:
        return _NAN
    return _from_order_key(highest)


@njit(**_INNER)
def _index_of(values: NDArray[np.float32], value: np.float32) -> int:
    """Lowest index of a value; -1 if there is none."""
    for i in range(values.size):
        if values[i] == value:
            return i
    return -1


@njit(**_INNER)
def _weigh(
    values: NDArray[np.float32], maximum: np.float32, inverse_temperature: np.float32, weights: NDArray[np.float32]
) -> None:
    """weights = exp((values - maximum) / temperature)."""
    for i in range(values.size):
        weights[i] = exp((values[i] - maximum) * inverse_temperature)


@njit(**_INNER)
def _mass(values: NDArray[np.float32], weights: NDArray[np.float32], minimum: np.float32) -> float:
    """float64 sum of the weights of values >= minimum: lane i adds elements i, i + LANES, ...; then lane by lane."""
    lanes = np.zeros(LANES, np.float64)
    full = values.size - values.size % LANES
    for start in range(0, full, LANES):
        for lane in range(LANES):
            i = start + lane
            lanes[lane] += np.float64(weights[i] if values[i] >= minimum else _ZERO)
    for i in range(full, values.size):
        lanes[i - full] += np.float64(weights[i] if values[i] >= minimum else _ZERO)
    total = 0.0
    for lane in range(LANES):
        total += lanes[lane]
    return total


@njit(**_INNER)
def _count(values: NDArray[np.float32], minimum: np.float32) -> np.int64:
    """Number of values >= minimum."""
    total = np.int32(0)
    for i in range(values.size):
        total += np.int32(values[i] >= minimum)
    return np.int64(total)


@njit(**_INNER)
def _keep(values: NDArray[np.float32], minimum: np.float32, kept: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values >= minimum, in their order, in the front of `kept`, which has one element more than `values`."""
    size = 0
    full = values.size - values.size % LANES
    for start in range(0, full, LANES):
        hits = np.int32(0)  # most groups have none, and looking is vectorised
        for i in range(start, start + LANES):
            hits += np.int32(values[i] >= minimum)
        if hits > 0:
            for i in range(start, start + LANES):
                kept[size] = values[i]
                size += values[i] >= minimum
    for i in range(full, values.size):
        kept[size] = values[i]
        size += values[i] >= minimum
    return kept[:size]


@njit(**_INNER)
def _bisect_count(values: NDArray[np.float32], k: int, maximum: np.float32) -> np.float32:
    """A minimum that keeps the k largest values (1 <= k <= size) and what equals the smallest of them."""
    low, high = np.int64(_LOWEST_KEY), np.int64(_order_key(maximum)) + 1
    while high - low > 1:  # low keeps at least k values, high fewer
        middle = (low + high) >> 1
        count = _count(values, _from_order_key(middle))
        if count == k:
            return _from_order_key(middle)
        if count > k:
            low = middle
        else:
            high = middle
    return _from_order_key(low)


@njit(**_INNER)
def _kth_largest(values: NDArray[np.float32], k: int, maximum: np.float32) -> np.float32:
    """As `_bisect_count`; for small k it first drops values that are smaller than k others."""
    if 2 * k > BINS or values.size < 4 * BINS:
        return _bisect_count(values, k, maximum)
    maxima = np.full(BINS, _LOWEST_KEY, np.int32)
    for start in range(0, values.size - values.size % BINS, BINS):
        for i in range(BINS):
            maxima[i] = max(maxima[i], _order_key(values[start + i]))
    bins = np.empty(BINS, np.float32)
    for i in range(BINS):
        bins[i] = _from_order_key(maxima[i])
    bound = _bisect_count(bins, k, maximum)
    # The bound itself may be the answer; a minimum below it would be right for the kept values only.
    return max(bound, _bisect_count(_keep(values, bound, np.empty(values.size + 1, np.float32)), k, maximum))


@njit(**_INNER)
def _nucleus(
    values: NDArray[np.float32],
    top_p: float,
    maximum: np.float32,
    inverse_temperature: np.float32,
    scratch: NDArray[np.float32],
    weights: NDArray[np.float32],
) -> np.float32:
    """The minimum that keeps the most likely values whose mass reaches `top_p` of the whole."""
    _weigh(values, maximum, inverse_temperature, weights)
    whole = _mass(values, weights[: values.size], -_INF)
    # Values this unlikely have less than half of 1 - top_p together, so the minimum lies above and they need no search.
    share = 0.5 * (1.0 - top_p) * whole / values.size
    low = np.float32(maximum + np.log(share) / inverse_temperature)
    values = _keep(values, low, scratch)
    weights = weights[: values.size]
    _weigh(values, maximum, inverse_temperature, weights)
    target = top_p * whole
    low_key, high_key = np.int64(_order_key(low)), np.int64(_order_key(maximum)) + 1
    while high_key - low_key > 1:  # low keeps enough mass, high does not
        middle = (low_key + high_key) >> 1
        if _mass(values, weights, _from_order_key(middle)) >= target:
            low_key = middle
        else:
            high_key = middle
    return _from_order_key(low_key)


@njit(**_KERNEL)
def minimum_logit(
    row: NDArray[np.float32],
    maximum: np.float32,
    inverse_temperature: np.float32,
    top_k: int,
    top_p: float,
    min_p: float,
) -> np.float32:
    """What top_k, then top_p within it, then min_p leave: the tokens whose logit is at least this.

    Args:
        row: float32 [vocabulary], C-contiguous, without NaN or +inf.
        maximum: Its largest logit.
        inverse_temperature: float32, 1 / temperature.
        top_k: 0 keeps all tokens.
        top_p: In (0, 1]: the most likely tokens whose probability reaches this share of what `top_k` left.
        min_p: In [0, 1]: tokens at least this many times as likely as the most likely one.
    """
    minimum = -_INF
    narrow = 0 < top_k < row.size
    if narrow:
        minimum = _kth_largest(row, top_k, maximum)
    if top_p < 1.0:
        scratch, weights = np.empty(row.size + 1, np.float32), np.empty(row.size, np.float32)
        values = _keep(row, minimum, np.empty(row.size + 1, np.float32)) if narrow else row
        minimum = max(minimum, _nucleus(values, top_p, maximum, inverse_temperature, scratch, weights))
    if min_p > 0.0:
        minimum = max(minimum, np.float32(maximum + np.log(min_p) / inverse_temperature))
    return minimum


@njit(**_INNER)
def _gumbel_argmax(
    row: NDArray[np.float32],
    maximum: np.float32,
    inverse_temperature: np.float32,
    minimum: np.float32,
    k0: int,
    k1: int,
    position: int,
) -> int:
    """argmax of logit / temperature - log(-log(u)) over logits >= minimum; -log(-log(u)) is standard Gumbel noise."""
    scores = np.empty(CHUNK, np.float32)
    best, token = -_INF, -1
    for start in range(0, row.size, CHUNK):
        logits = row[start : start + CHUNK]
        for block in range((logits.size + WORDS_PER_BLOCK - 1) // WORDS_PER_BLOCK):
            w0, w1, w2, w3 = philox4x32(start // WORDS_PER_BLOCK + block, 0, position, STREAM_SAMPLING, k0, k1)
            first = WORDS_PER_BLOCK * block
            scores[first] = uniform(w0)
            scores[first + 1] = uniform(w1)
            scores[first + 2] = uniform(w2)
            scores[first + 3] = uniform(w3)
        highest = _LOWEST_KEY
        for i in range(logits.size):
            # Relative to the maximum, so that a tiny temperature cannot overflow the winner.
            score = (logits[i] - maximum) * inverse_temperature - log(-log(scores[i]))
            score = score if logits[i] >= minimum else -_INF
            scores[i] = score
            highest = max(highest, _order_key(score))
        if _from_order_key(highest) > best:
            best = _from_order_key(highest)
            token = start + _index_of(scores[: logits.size], best)
    return token


@njit(**_INNER)
def _sample_some(  # type: ignore[no-untyped-def]
    thread, threads, logits, temperature, top_k, top_p, min_p, keys, positions, token_ids
):
    rows = logits.shape[0]
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        row = logits[r]
        maximum = _largest(row)
        if np.isnan(maximum):
            token_ids[r] = -1
        elif temperature[r] == _ZERO:
            token_ids[r] = _index_of(row, maximum)
        else:
            inverse = _ONE / temperature[r]
            minimum = minimum_logit(row, maximum, inverse, top_k[r], top_p[r], min_p[r])
            token_ids[r] = _gumbel_argmax(row, maximum, inverse, minimum, keys[r, 0], keys[r, 1], positions[r])


@njit(**_KERNEL)
def sample_rows(
    logits: NDArray[np.float32],
    temperature: NDArray[np.float32],
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float64],
    min_p: NDArray[np.float64],
    keys: NDArray[np.uint32],
    positions: NDArray[np.int64],
    token_ids: NDArray[np.int64],
) -> None:
    """Draw a token for every row: greedy where the temperature is 0, else top_k, top_p, min_p and Gumbel-max.

    Args:
        logits: float32 [rows, vocabulary], C-contiguous; -inf for impossible tokens.
        temperature: float32 [rows], 0 or at least 1e-30.
        top_k: int64 [rows], 0 keeps all tokens.
        top_p: float64 [rows] in (0, 1].
        min_p: float64 [rows] in [0, 1].
        keys: uint32 [rows, 2], Philox key words.
        positions: int64 [rows], position in the sequence of the token that is drawn.
        token_ids: int64 [rows], overwritten; -1 where a logit is NaN or +inf, or all are -inf.
    """
    threads = usable_threads() if logits.shape[0] > 1 else 1  # one row wakes nobody
    arguments = (logits, temperature, top_k, top_p, min_p, keys, positions, token_ids)
    launch(threads, _sample_some, (threads, *arguments))


@njit(**_INNER)
def _find_unusable(thread, threads, logits, out):  # type: ignore[no-untyped-def]
    rows = logits.shape[0]
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        out[r] = np.isnan(_largest(logits[r]))


@njit(**_KERNEL)
def unusable_rows(logits: NDArray[np.float32], out: NDArray[np.bool_]) -> None:
    """Find rows from which no token can be drawn: a logit is NaN or +inf, or all are -inf.

    Args:
        logits: float32 [rows, vocabulary], C-contiguous.
        out: bool [rows], overwritten.
    """
    threads = usable_threads() if logits.shape[0] > 1 else 1  # one row wakes nobody
    launch(threads, _find_unusable, (threads, logits, out))


@njit(**_INNER)
def _log_sum_exp_some(thread, threads, logits, which, out):  # type: ignore[no-untyped-def]
    for i in range(which.size * thread // threads, which.size * (thread + 1) // threads):
        row = logits[which[i]]
        maximum = _largest(row)
        weights = np.empty(row.size, np.float32)
        _weigh(row, maximum, _ONE, weights)
        out[i] = np.float64(maximum) + np.log(_mass(row, weights, -_INF))


@njit(**_KERNEL)
def log_sum_exp_rows(logits: NDArray[np.float32], which: NDArray[np.int64], out: NDArray[np.float64]) -> None:
    """log(sum(exp(row))) of some rows.

    Args:
        logits: float32 [rows, vocabulary], C-contiguous; the rows are usable.
        which: int64 [wanted], indices of rows.
        out: float64 [wanted], overwritten.
    """
    threads = usable_threads() if which.size > 1 else 1
    launch(threads, _log_sum_exp_some, (threads, logits, which, out))


@njit(**_KERNEL)
def largest_ids(row: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Ids of the k largest logits and of those that equal the smallest of these, by id.

    Args:
        row: float32 [vocabulary] without NaN or +inf.
        k: In [1, vocabulary].
    """
    minimum = _kth_largest(row, k, _largest(row))
    return np.flatnonzero(row >= minimum)
