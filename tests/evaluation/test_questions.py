"""Question files, and when a text answers a question."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.errors import QuestionError
from evaluation.questions import Question, contains_words, load_questions, normalise

PARIS = Question("What is the capital of France?", ("Paris",), "capitals")


def write(folder: Path, text: str) -> Path:
    path = folder / "questions.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


class TestNormalise:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("The  Eiffel Tower!", "eiffel tower"),
            ("an apple, a day", "apple day"),
            ("Port-au-Prince", "port au prince"),
            ("Bogotá", "bogota"),
            ("Washington, D.C.", "washington dc"),
            ("St. John’s", "st johns"),
            ("theatre", "theatre"),
            ("Straße", "strasse"),
            ("«Москва»", "москва"),
            ("?!", ""),
        ],
    )
    def test_keeps_what_tells_answers_apart(self, text: str, expected: str) -> None:
        assert normalise(text) == expected

    @given(st.text())
    def test_is_lower_case_words_and_single_spaces(self, text: str) -> None:
        result = normalise(text)
        assert result == " ".join(result.split())
        assert not set(result) & set(".,;:!?'\"-()")


class TestScoring:
    @pytest.mark.parametrize("text", ["Paris", "The capital of France is Paris.", "paris, of course", "PARIS!"])
    def test_answer_counts_wherever_it_stands(self, text: str) -> None:
        assert PARIS.contained_in(text)

    @pytest.mark.parametrize("text", ["", "Parisian", "comparison", "Lyon", "Pa ris"])
    def test_part_of_a_word_is_no_answer(self, text: str) -> None:
        assert not PARIS.contained_in(text)

    def test_words_of_an_answer_must_stand_together(self) -> None:
        question = Question("?", ("New Delhi",))
        assert question.contained_in("It is New Delhi.")
        assert not question.contained_in("It is new to Delhi.")

    def test_any_accepted_answer_will_do(self) -> None:
        question = Question("What is the capital of Bolivia?", ("La Paz", "Sucre"))
        assert question.contained_in("I think Sucre")
        assert question.equals("la paz.")

    def test_exact_match_allows_nothing_else(self) -> None:
        assert PARIS.equals(" The Paris. ")
        assert not PARIS.equals("It is Paris")

    def test_empty_answer_occurs_nowhere(self) -> None:
        assert not contains_words("some text", "")
        assert not Question("?", ("the",)).contained_in("the end")


class TestLoading:
    def test_reads_both_forms_and_skips_empty_lines(self, tmp_path: Path) -> None:
        path = write(
            tmp_path,
            '{"question": "Who wrote Emma?", "answer": "Jane Austen", "id": 3}\n\n'
            '{"question": "Capital of Bolivia?", "answers": ["La Paz", "Sucre"], "category": "capitals"}\n',
        )
        assert load_questions(path) == [
            Question("Who wrote Emma?", ("Jane Austen",)),
            Question("Capital of Bolivia?", ("La Paz", "Sucre"), "capitals"),
        ]

    def test_line_separators_of_unicode_may_stand_in_strings(self, tmp_path: Path) -> None:
        path = write(tmp_path, '{"question": "a\u2028b?", "answer": "c"}\n')
        assert load_questions(path)[0].question == "a\u2028b?"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "no valid JSON"),
            ("[1]", "must be an object"),
            ('{"question": "x?"}', "either 'answers'"),
            ('{"question": "x?", "answer": "a", "answers": ["a"]}', "either 'answers'"),
            ('{"question": "x?", "answers": []}', "at least one string"),
            ('{"question": "x?", "answers": "a"}', "list of at least one"),
            ('{"question": "x?", "answers": ["a", 1]}', "'answers' must hold text"),
            ('{"question": "x?", "answer": "?!"}', "'answer' must hold text"),
            ('{"question": " ", "answer": "yes"}', "'question' must be"),
            ('{"answer": "yes"}', "'question' must be"),
            ('{"question": "x?", "answer": "yes", "category": 1}', "'category' must be"),
        ],
    )
    def test_malformed_line_is_named(self, tmp_path: Path, line: str, message: str) -> None:
        path = write(tmp_path, f'{{"question": "x?", "answer": "yes"}}\n{line}\n')
        with pytest.raises(QuestionError, match=message) as error:
            load_questions(path)
        assert f"{path}:2:" in str(error.value)

    def test_file_without_questions_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(QuestionError, match="holds no questions"):
            load_questions(write(tmp_path, "\n"))

    def test_missing_and_undecodable_files_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(QuestionError, match=r"missing\.jsonl"):
            load_questions(tmp_path / "missing.jsonl")
        path = tmp_path / "latin.jsonl"
        path.write_bytes(b'{"question": "\xe9?", "answer": "e"}')
        with pytest.raises(QuestionError, match=r"latin\.jsonl"):
            load_questions(path)
