"""Diversity of samples against values worked out by hand."""

from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.diversity import distinct_n, mean_diversity, measure_diversity, self_bleu

SAMPLES = st.lists(
    st.lists(st.sampled_from(["red", "green", "blue"]), max_size=5).map(" ".join), min_size=2, max_size=6
)


class TestDistinct:
    def test_counts_different_n_grams_of_all_samples_together(self) -> None:
        samples = [["a", "b", "a"], ["a", "b", "c"]]
        assert distinct_n(samples, 1) == 3 / 6  # a b c
        assert distinct_n(samples, 2) == 3 / 4  # ab ba bc
        assert distinct_n(samples, 3) == 2 / 2

    def test_n_grams_do_not_cross_samples(self) -> None:
        assert distinct_n([["a"], ["b"]], 2) is None


class TestSelfBleu:
    def test_equal_samples_score_one(self) -> None:
        assert self_bleu(["paris", "paris"]) == 1.0

    def test_samples_without_a_common_word_score_zero(self) -> None:
        assert self_bleu(["red", "green", "blue"]) == 0.0

    def test_is_the_mean_bleu_against_the_others(self) -> None:
        # "a b" against "a b c" as reference: precisions 2/2 and 1/1, brevity penalty exp(1 - 3/2).
        # "a b c" against "a b": precisions 2/3, 1/2 and, no trigram matching, 1/2 by exponential smoothing.
        expected = (exp(1 - 3 / 2) + (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3)) / 2
        assert self_bleu(["a b", "a b c"]) == pytest.approx(expected)

    def test_sample_that_occurs_twice_scores_one(self) -> None:
        assert self_bleu(["red", "red", "blue"]) == pytest.approx(2 / 3)

    def test_single_sample_has_none(self) -> None:
        assert self_bleu(["red"]) is None

    @given(SAMPLES)
    def test_scoring_each_different_text_once_changes_nothing(self, samples: list[str]) -> None:
        from sacrebleu import sentence_bleu

        plain = [
            sentence_bleu(text, samples[:place] + samples[place + 1 :], use_effective_order=True).score / 100
            if text or "" not in samples[:place] + samples[place + 1 :]
            else 1.0
            for place, text in enumerate(samples)
        ]
        assert self_bleu(samples) == pytest.approx(sum(plain) / len(plain))


class TestMeasuring:
    def test_case_and_spaces_make_no_difference(self) -> None:
        measured = measure_diversity(["New  Delhi", "new delhi", "Delhi"])
        assert measured.unique == 2 / 3
        assert measured.mean_words == 5 / 3
        assert measured.distinct_1 == 2 / 5
        assert measured.distinct_2 == 1 / 2
        assert measured.distinct_3 is None

    def test_same_answer_every_time_is_the_least_diverse(self) -> None:
        measured = measure_diversity(["Paris"] * 4)
        assert (measured.unique, measured.distinct_1, measured.self_bleu) == (1 / 4, 1 / 4, 1.0)

    def test_empty_answers_have_no_words(self) -> None:
        measured = measure_diversity(["", ""])
        assert (measured.distinct_1, measured.mean_words, measured.self_bleu) == (None, 0.0, 1.0)

    @given(SAMPLES)
    def test_every_measure_is_a_share(self, samples: list[str]) -> None:
        measured = measure_diversity(samples).to_json()
        del measured["mean_words"]
        assert all(value is None or 0 <= value <= 1 for value in measured.values())

    def test_mean_leaves_out_prompts_without_a_value(self) -> None:
        mean = mean_diversity([measure_diversity(["a b"] * 2), measure_diversity(["a", "c"])])
        assert mean.distinct_1 == (2 / 4 + 1) / 2
        assert mean.distinct_2 == 1 / 2
        assert mean.distinct_3 is None
        assert mean.self_bleu == 1 / 2
        assert mean.mean_words == 1.5
