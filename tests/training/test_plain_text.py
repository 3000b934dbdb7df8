import textwrap

from hypothesis import given
from hypothesis import strategies as st

from training.plain_text import drop_contents, unwrap

SENTENCES = (
    "The quick brown fox jumps over the lazy dog and then sits down by the river to watch the boats go by. "
    "It stays there until the evening comes, and nobody passes who could tell it where all the people went."
)


def wrapped(text: str, **options: object) -> str:
    return textwrap.fill(text, 72, **options)  # type: ignore[arg-type]


class TestUnwrap:
    def test_the_lines_of_a_paragraph_are_joined(self) -> None:
        assert unwrap(wrapped(SENTENCES) + "\n \n\n\n" + wrapped(SENTENCES)) == f"{SENTENCES}\n\n{SENTENCES}"

    def test_common_indentation_is_removed(self) -> None:
        indented = wrapped(SENTENCES, initial_indent="   ", subsequent_indent="   ")
        assert unwrap(indented) == SENTENCES

    def test_items_of_a_list_keep_their_lines(self) -> None:
        item = wrapped("* " + SENTENCES, initial_indent="     ", subsequent_indent="       ")
        number = wrapped("12. " + SENTENCES, initial_indent="     ", subsequent_indent="         ")
        assert unwrap(f"{item}\n{number}") == f"* {SENTENCES}\n12. {SENTENCES}"

    def test_short_lines_and_listings_keep_their_lines(self) -> None:
        verse = "Roses are red,\n  violets are blue,\nsugar is sweet."
        listing = "   untar it:\n     tar xf hello.tar.gz\n     cd hello"
        assert unwrap(f"{verse}\n\n{listing}") == f"{verse}\n\nuntar it:\n  tar xf hello.tar.gz\n  cd hello"

    def test_drawn_rules_are_no_text_and_rows_of_drawn_tables_keep_their_lines(self) -> None:
        table = "\n".join("│ " + "x" * 66 + " │" for _ in range(3))
        assert unwrap(f"Title\n=====\n\n   ═══════\n\n{table}") == f"Title\n\n{table}"

    def test_one_space_after_a_sentence(self) -> None:
        assert unwrap("He came.  She went;  they stayed.\nname     value") == (
            "He came. She went; they stayed.\nname     value"
        )

    @given(st.lists(st.text("ab c.\n\t*-=", max_size=90), max_size=8))
    def test_no_word_is_lost(self, blocks: list[str]) -> None:
        text = "\n\n".join(blocks)
        letters = [character for character in text if character in "abc"]
        assert [character for character in unwrap(text) if character in "abc"] == letters


class TestDropContents:
    entries = tuple(f"{number}. Chapter" for number in range(10))

    def test_a_table_of_contents_is_left_out_but_for_the_heading_after_it(self) -> None:
        text = "\n\n".join([SENTENCES, *self.entries, "1. The fox", SENTENCES])
        assert drop_contents(text) == "\n\n".join([SENTENCES, "1. The fox", SENTENCES])

    def test_a_few_short_paragraphs_are_kept(self) -> None:
        text = "\n\n".join([SENTENCES, *self.entries[:7], SENTENCES])
        assert drop_contents(text) == text

    def test_a_table_at_the_end(self) -> None:
        assert drop_contents("\n\n".join([SENTENCES, *self.entries])) == f"{SENTENCES}\n\n9. Chapter"
