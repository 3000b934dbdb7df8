"""The sampling kernels against sorting, float64 and the standard library."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.cpu.sampling import largest_ids, log, log_sum_exp_rows, minimum_logit, unusable_rows

SIZES = [1, 3, 31, 1000, 4099, 49152]  # below and above each kernel's group of lanes, chunk and bins


def normal(size: int, seed: int, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, size).astype(np.float32)


def kept(row: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    minimum = minimum_logit(row, row.max(), np.float32(1 / temperature), top_k, top_p, min_p)
    return set(np.flatnonzero(row >= minimum).tolist())


def kept_by_sorting(row: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """One token after the other, best first."""
    order = sorted(range(len(row)), key=lambda token_id: -row[token_id])[: top_k or None]
    weights = {t: math.exp((float(row[t]) - float(row.max())) / temperature) for t in order}
    whole, mass, result = math.fsum(weights.values()), 0.0, set()
    for token_id in order:
        if (mass < top_p * whole or top_p == 1) and weights[token_id] >= min_p:
            result.add(token_id)
        mass += weights[token_id]
    return result


def test_log_is_accurate_over_all_that_gumbel_noise_needs() -> None:
    uniforms = np.concatenate(
        (
            [2.0**-24, 1 - 2.0**-24, 0.5, 1 - 2.0**-23],
            (np.random.default_rng(0).integers(0, 2**23, 5000) + 0.5) * 2.0**-23,
        )
    ).astype(np.float32)

    for x in (*uniforms, *-np.log(uniforms)):
        assert log(x) == pytest.approx(math.log(x), rel=1.2e-7, abs=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_log_sum_exp(size: int, scale: float) -> None:
    rows = np.stack([normal(size, seed, scale) for seed in range(3)])
    out = np.empty(2, np.float64)

    log_sum_exp_rows(rows, np.array([2, 0]), out)

    np.testing.assert_allclose(out, np.logaddexp.reduce(rows[[2, 0]].astype(np.float64), axis=1), atol=1e-6, rtol=1e-7)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [1, 2, 20, 513, 4098, 49152])
def test_largest_ids(size: int, k: int) -> None:
    row, k = normal(size, k), min(k, size)

    assert set(largest_ids(row, k)) == set(np.argsort(-row, kind="stable")[:k])


def test_largest_ids_include_ties() -> None:
    assert largest_ids(np.array([0, 2, 1, -0.0, 0, -3], np.float32), 3).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 10.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(5, 1.0, 0.0), (600, 1.0, 0.0), (0, 0.01, 0.0), (0, 0.9, 0.0), (0, 0.99999, 0.0), (0, 1.0, 0.1), (40, 0.8, 0.05)],
)
def test_kept_tokens_equal_those_found_by_sorting(
    size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = normal(size, 7)

    found, wanted = kept(row, temperature, top_k, top_p, min_p), kept_by_sorting(row, temperature, top_k, top_p, min_p)

    # Rounding may move the end of a nucleus by one of the tokens that hardly matter, and no others.
    assert len(found ^ wanted) <= (1 if top_p > 0.9999 and size > 4000 else 0)


@settings(deadline=None)
@given(
    logits=st.lists(st.integers(-3, 3), min_size=1, max_size=80),
    temperature=st.sampled_from([1e-30, 1e-3, 0.5, 1.0, 10.0]),
    top_k=st.integers(0, 90),
    top_p=st.sampled_from([1e-300, 1e-9, 0.5, 0.9, 1 - 1e-16, 1.0]),
    min_p=st.sampled_from([0.0, 1e-300, 0.1, 1.0]),
)
def test_ties_share_their_fate_and_the_best_token_is_always_kept(
    logits: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = np.array(logits, np.float32)

    tokens = kept(row, temperature, top_k, top_p, min_p)

    assert int(row.argmax()) in tokens
    assert {float(row[t]) for t in tokens}.isdisjoint(float(row[t]) for t in set(range(len(row))) - tokens)


def test_masked_tokens_do_not_count() -> None:
    row = normal(5000, 1)
    row[::2] = -np.inf

    assert kept(row, top_k=30, top_p=0.7) == kept_by_sorting(row, 1.0, 30, 0.7, 0.0)
    assert kept(row, top_p=0.9) == kept_by_sorting(row, 1.0, 0, 0.9, 0.0)


@pytest.mark.parametrize("place", [0, 17, 32, 99])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
def test_unusable_rows(place: int, value: float) -> None:
    rows = np.zeros((4, 100), np.float32)
    rows[1, place], rows[2, place], rows[3] = value, -np.inf, -np.inf
    out = np.empty(4, np.bool_)

    unusable_rows(rows, out)

    assert out.tolist() == [False, True, False, True]
