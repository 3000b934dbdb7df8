import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.errors import InvalidTuneConfig
from training.schedule import Constant, Linear, Mixture, learning_rate_share, parse_p

shares = st.integers(0, 20).flatmap(
    lambda relu: st.integers(0, 20 - relu).map(lambda silu: (relu / 20, silu / 20, (20 - relu - silu) / 20))
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


class TestParse:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("0.7", Constant(0.7)),
            ("0", Constant(0.0)),
            (".5", Constant(0.5)),
            ("1e-2", Constant(0.01)),
            ("1.0:0.3", Linear(1.0, 0.3)),
            ("relu=0.5,silu=0.25,uniform=0.25", Mixture(0.5, 0.25, 0.25)),
            ("silu=0.4, relu=0.6", Mixture(0.6, 0.4, 0.0)),
            ("uniform=1", Mixture(0.0, 0.0, 1.0)),
        ],
    )
    def test_reads_the_three_forms(self, text: str, expected: object) -> None:
        assert parse_p(text) == expected

    @pytest.mark.parametrize(
        "text",
        ["", "1.5", "-0.5", "nan", "0.5:1.5", "0.5:", "a", "relu", "relu=", "gelu=1", "relu=2", "relu=0.5;silu=0.5"],
    )
    def test_refuses_anything_else_by_name_and_says_what_is_allowed(self, text: str) -> None:
        with pytest.raises(InvalidTuneConfig, match=r"^p must be a number in \[0, 1\], 'START:END', or") as error:
            parse_p(text)
        assert error.value.field == "p"

    @pytest.mark.parametrize("text", ["relu=0.5", "relu=0.5,silu=0.25,uniform=0.3", "silu=0"])
    def test_refuses_shares_that_do_not_add_up(self, text: str) -> None:
        with pytest.raises(InvalidTuneConfig, match="must add up to 1"):
            parse_p(text)

    def test_refuses_a_share_that_is_named_twice(self) -> None:
        with pytest.raises(InvalidTuneConfig, match=r"relu=0\.3,relu=1"):
            parse_p("relu=0.3,relu=1")


class TestDraws:
    def test_constant(self) -> None:
        assert Constant(0.25).draw(0.5, 3, rng()).tolist() == [0.25] * 3

    @pytest.mark.parametrize(("progress", "expected"), [(0.0, 1.0), (0.5, 0.75), (1.0, 0.5)])
    def test_linear_goes_from_start_to_end(self, progress: float, expected: float) -> None:
        assert Linear(1.0, 0.5).draw(progress, 2, rng()).tolist() == [expected] * 2

    @settings(deadline=None)
    @given(shares, st.integers(1, 64), st.integers(0, 2**32))
    def test_a_batch_has_each_share_rounded_up_or_down(
        self, mixture: tuple[float, float, float], batch_size: int, seed: int
    ) -> None:
        relu, silu, uniform = mixture
        p = Mixture(relu, silu, uniform).draw(0.5, batch_size, rng(seed))
        assert p.dtype == np.float32
        assert len(p) == batch_size
        counts = ((p == 0).sum(), (p == 1).sum(), ((p > 0) & (p < 1)).sum())
        for share, count in zip((relu, silu, uniform), counts, strict=True):
            assert math.floor(share * batch_size + 1e-9) <= count <= math.ceil(share * batch_size - 1e-9)

    @settings(deadline=None)
    @given(st.integers(1, 8), st.integers(0, 2**32))
    def test_shares_that_divide_the_batch_are_met_exactly(self, eighths: int, seed: int) -> None:
        p = Mixture(eighths / 8, 1 - eighths / 8, 0.0).draw(0.0, 16, rng(seed))
        assert sorted(p.tolist()) == [0.0] * 2 * eighths + [1.0] * (16 - 2 * eighths)

    def test_shares_are_met_on_average_where_they_do_not_divide_the_batch(self) -> None:
        mixture, generator = Mixture(0.3, 0.2, 0.5), rng(1)
        batches = np.stack([mixture.draw(0.0, 3, generator) for _ in range(4000)])
        assert np.mean(batches == 0) == pytest.approx(0.3, abs=0.01)
        assert np.mean(batches == 1) == pytest.approx(0.2, abs=0.01)
        # The place in a batch says nothing about the share: micro batches would else be of one kind.
        assert np.allclose((batches == 0).mean(axis=0), 0.3, atol=0.03)

    def test_uniform_p_is_uniform(self) -> None:
        p = Mixture(0.0, 0.0, 1.0).draw(0.0, 20_000, rng(2))
        counts, _ = np.histogram(p, bins=10, range=(0, 1))
        assert np.abs(counts - 2000).max() < 5 * math.sqrt(1800)


class TestLearningRate:
    STEPS, WARMUP, FLOOR = 1000, 10, 0.02

    def share(self, step: int) -> float:
        return learning_rate_share(step, self.STEPS, self.WARMUP, self.FLOOR)

    def test_warms_up_linearly(self) -> None:
        assert [self.share(step) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3], rel=1e-3)

    def test_is_half_way_down_in_the_middle_and_at_the_floor_in_the_end(self) -> None:
        assert self.share(500) == pytest.approx((1 + self.FLOOR) / 2)
        assert self.share(999) == pytest.approx(self.FLOOR, rel=1e-3)

    def test_falls_after_the_warm_up(self) -> None:
        after = [self.share(step) for step in range(self.WARMUP, self.STEPS)]
        assert all(later < earlier for earlier, later in pairwise(after))
        assert min(after) > self.FLOOR

    def test_no_warm_up_starts_at_the_peak(self) -> None:
        assert learning_rate_share(0, 100, 0, 0.0) == 1.0
