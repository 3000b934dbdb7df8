import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.errors import CorpusError
from training.overlap import HeldOutText, overlap

WORDS = [f"word{number}" for number in range(4000)]


def words(seed: int, count: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=count)


def naive_overlap(train: list[str], held_out: list[str], n: int) -> float:
    def runs(text: str) -> list[tuple[str, ...]]:
        tokens = text.split()
        return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    known = {run for text in train for run in runs(text)}
    held = [run for text in held_out for run in runs(text)]
    return sum(run in known for run in held) / len(held)


class TestOverlap:
    def test_share_of_held_out_runs_that_occur_in_training(self) -> None:
        quoted, own = words(1, 30), words(2, 70)
        train = " ".join([*words(3, 200), *quoted, *words(4, 200)])
        # 100 words have 88 runs of 13; the quotation of 30 words has 18.
        assert overlap([train], [" ".join(quoted + own)]) == pytest.approx(18 / 88)

    def test_texts_that_share_nothing(self) -> None:
        assert overlap([" ".join(words(1, 500))], [" ".join(words(2, 500))]) == 0.0

    def test_case_punctuation_and_line_breaks_do_not_hide_a_quotation(self) -> None:
        text = words(1, 13)
        assert overlap([" ".join(text)], ['"' + ",\n".join(text).upper() + '."']) == 1.0

    def test_runs_do_not_go_from_one_text_into_the_next(self) -> None:
        text = words(1, 20)
        assert overlap([" ".join(text[:10]), " ".join(text[10:])], [" ".join(text)]) == 0.0

    @given(
        st.lists(st.text("ab ", max_size=40), max_size=4),
        st.lists(st.text("ab ", min_size=10, max_size=40), min_size=1, max_size=3),
    )
    def test_agrees_with_a_plain_count(self, train: list[str], held_out: list[str]) -> None:
        if not any(len(text.split()) >= 3 for text in held_out):
            with pytest.raises(CorpusError, match="3 words in a row"):
                overlap(train, held_out, n=3)
            return
        assert overlap(train, held_out, n=3) == pytest.approx(naive_overlap(train, held_out, 3))


class TestRemoval:
    held = words(1, 60)
    held_out = HeldOutText([" ".join(held)])

    def test_paragraphs_with_a_held_out_run_are_removed(self) -> None:
        kept = [" ".join(words(seed, 40)) for seed in (2, 3)]
        leak = " ".join([*words(4, 5), *self.held[20:33], *words(5, 5)])
        assert self.held_out.remove_from("\n\n".join([kept[0], leak, kept[1]])) == ("\n\n".join(kept), 1)

    def test_a_run_over_several_paragraphs_takes_them_all(self) -> None:
        items = [" ".join(self.held[i : i + 5]) for i in range(0, 15, 5)]
        kept = " ".join(words(2, 40))
        assert self.held_out.remove_from("\n\n".join([*items, kept])) == (kept, 3)

    def test_the_paragraph_after_a_quotation_is_kept_even_if_its_first_word_would_fit(self) -> None:
        kept = " ".join([self.held[30], *words(2, 40)])
        assert self.held_out.remove_from(" ".join(self.held[:30]) + "\n\n" + kept) == (kept, 1)

    def test_fewer_words_than_a_run_are_no_leak(self) -> None:
        text = " ".join([*words(2, 30), *self.held[:12], *words(3, 30)])
        assert self.held_out.remove_from(text) == (text, 0)
        assert not self.held_out.occurs_in(text)

    @given(st.lists(st.text("ab ,\n", max_size=30), max_size=6), st.text("ab ", min_size=12, max_size=30))
    def test_nothing_is_left_of_it(self, paragraphs: list[str], held: str) -> None:
        if len(held.split()) < 3:
            return
        held_out = HeldOutText([held], n=3)
        text, removed = held_out.remove_from("\n\n".join(paragraphs))
        assert not held_out.occurs_in(text)
        assert removed > 0 or text == "\n\n".join(paragraphs)
