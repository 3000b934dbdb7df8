"""Kernels that draw tokens, against those of the CPU: the same tokens, and exp and log but for fused additions."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numba import njit
from torch import Tensor

from engine.kernels.cpu import math as cpu_math
from engine.kernels.cpu import sampling as cpu
from engine.kernels.triton.sampling import CHUNK, SCORED, DrawRows, draw_tokens, exp, log, normalisers
from engine.sampler import DrawParameters
from tests.engine.kernels.kinds import normal
from tests.engine.kernels.triton.devices import DEVICE


@triton.jit
def _functions(x, exps, logs, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    values = tl.load(x + at)
    tl.store(exps + at, exp(-values))
    tl.store(logs + at, log(values))


# Compiled anew and without flags: the CPU's kernels may fuse a multiplication and an addition.
_exp, _log = (njit(forceinline=True)(function.py_func) for function in (cpu_math.exp, cpu.log))


@njit
def _functions_of_the_cpu(x, exps, logs):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        exps[i] = _exp(-x[i])
        logs[i] = _log(x[i])


def test_exp_and_log_have_the_bits_of_the_cpu_but_for_fused_additions() -> None:
    size = 1 << 14
    x = torch.from_numpy(np.random.default_rng(0).uniform(-30, 4.6, size).astype(np.float32)).exp()
    x[:3] = torch.tensor([2.0**-24, 1 - 2.0**-24, 1.0])
    exps, logs = torch.empty(2, size, device=DEVICE)
    _functions[(1,)](x.to(DEVICE), exps, logs, SIZE=size, enable_fp_fusion=False)
    expected_exps, expected_logs = torch.empty(2, size)

    _functions_of_the_cpu(x.numpy(), expected_exps.numpy(), expected_logs.numpy())

    assert torch.equal(exps.cpu(), expected_exps)
    assert torch.equal(logs.cpu(), expected_logs)


def parameters(rows: int, seed: int) -> DrawParameters:
    """Of every kind, greedy ones among them."""
    rng = np.random.default_rng(seed)

    def one_of(*values: float) -> np.ndarray:
        return rng.choice(np.array(values), rows)

    return DrawParameters(
        temperature=one_of(0, 1e-30, 1e-3, 0.7, 1, 10).astype(np.float32),
        top_k=one_of(0, 0, 1, 3, 11).astype(np.int64),
        top_p=one_of(1e-9, 0.3, 0.9, 0.999, 1, 1),
        min_p=one_of(0, 0, 0.05, 1),
        keys=rng.integers(0, 2**32, (rows, 2)).astype(np.uint32),
        positions=rng.integers(0, 9000, rows),
    )


def tokens_of_the_cpu(logits: Tensor, chosen: DrawParameters) -> list[int]:
    token_ids = np.empty(len(logits), np.int64)
    cpu.sample_rows(logits.numpy(), *chosen, token_ids)
    drawn: list[int] = token_ids.tolist()
    return drawn


def tokens(logits: Tensor, chosen: DrawParameters) -> list[int]:
    drawn: list[int] = draw_tokens(logits.to(DEVICE), DrawRows.make(chosen, DEVICE)).tolist()
    return drawn


@pytest.mark.parametrize(("vocab", "rows"), [(11, 12), (1023, 8), (1025, 6), (CHUNK + 1, 3), (3 * CHUNK, 1)])
def test_tokens_are_those_of_the_cpu(vocab: int, rows: int) -> None:
    logits, chosen = 3 * normal(rows, vocab, seed=vocab), parameters(rows, vocab)
    logits[:, ::3] = logits[:, ::3].round()  # equal logits share their fate
    logits[rows // 2, 1::2] = -torch.inf  # impossible tokens

    assert tokens(logits, chosen) == tokens_of_the_cpu(logits, chosen)


def test_no_rows() -> None:
    assert tokens(torch.empty(0, 50), parameters(0, 0)) == []
    assert normalisers(torch.empty(0, 50, device=DEVICE))[0].shape == (0,)


def test_the_last_token_can_win() -> None:
    for vocab in (1, SCORED, SCORED + 1):
        logits = torch.full((3, vocab), -50.0)
        logits[:, -1] = 50.0

        assert tokens(logits, parameters(3, 1)) == [vocab - 1] * 3


def test_a_greedy_row_takes_the_lowest_id_among_the_most_likely() -> None:
    logits = torch.zeros(2, 2 * SCORED)
    logits[0, [31, 1500]], logits[1, 0] = 1.0, -0.0

    chosen = parameters(2, 0)._replace(temperature=np.zeros(2, np.float32))

    assert tokens(logits, chosen) == [31, 0]


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # of NaN, in the interpreter
@pytest.mark.parametrize("place", [0, 99])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
def test_unusable_rows_draw_nothing_and_spoil_no_other(place: int, value: float) -> None:
    logits, chosen = normal(4, 100, seed=0), parameters(4, 3)
    logits[1, place], logits[3] = value, -torch.inf

    drawn, (maxima, _) = tokens(logits, chosen), normalisers(logits.to(DEVICE))

    assert drawn == tokens_of_the_cpu(logits, chosen)
    assert [token < 0 for token in drawn] == maxima.isnan().tolist() == [False, True, False, True]


def test_a_row_draws_alike_alone_and_in_a_batch() -> None:
    logits, chosen = 3 * normal(8, 300, seed=0), parameters(8, 5)
    together = tokens(logits, chosen)

    for row in (0, 7):
        alone = DrawParameters(*(values[row : row + 1] for values in chosen))
        assert tokens(logits[row : row + 1], alone) == together[row : row + 1]


def test_normalisers_make_log_sum_exp() -> None:
    logits = 5 * normal(3, CHUNK + 5, seed=0)
    logits[1, 7:] = -torch.inf

    maxima, masses = normalisers(logits.to(DEVICE))

    expected = torch.logsumexp(logits.double(), 1)
    torch.testing.assert_close((maxima.double() + masses.log()).cpu(), expected, rtol=0, atol=1e-7)
