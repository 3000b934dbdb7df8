"""Patterns of quiz(6), and questions from lines of its data."""

from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.errors import QuestionError
from evaluation.questions import Question, contains_words, normalise
from evaluation.quiz import MIN_ANSWER_LETTERS, TOPICS, QuizTopic, expand, read_quiz, split_fields

# A pattern as a tree: a character, or (opening bracket, alternatives), each alternative a list of such items.
Item = str | tuple[str, list[list["Item"]]]
CAPITALS = QuizTopic("africa", "capitals", "What is the capital of {}?", 0, 1)


def items() -> st.SearchStrategy[list[list[Item]]]:
    characters = st.sampled_from("ab :|[]{}\\")
    sequence: st.SearchStrategy[list[Item]] = st.lists(characters, max_size=3)

    def nest(alternatives: st.SearchStrategy[list[list[Item]]]) -> st.SearchStrategy[list[list[Item]]]:
        item = characters | st.tuples(st.sampled_from("[{"), alternatives)
        return st.lists(st.lists(item, max_size=2), min_size=1, max_size=2)

    return st.recursive(st.lists(sequence, min_size=1, max_size=2), nest, max_leaves=5)


def write_pattern(alternatives: list[list[Item]]) -> str:
    def write(item: Item) -> str:
        if isinstance(item, str):
            return f"\\{item}" if item in ":|[]{}\\" else item
        opening, inner = item
        return opening + write_pattern(inner) + ("]" if opening == "[" else "}")

    return "|".join("".join(map(write, sequence)) for sequence in alternatives)


def texts_of(alternatives: list[list[Item]]) -> set[str]:
    def texts(item: Item) -> set[str]:
        if isinstance(item, str):
            return {item}
        opening, inner = item
        return texts_of(inner) | ({""} if opening == "{" else set())

    return {"".join(parts) for sequence in alternatives for parts in product(*map(texts, sequence))}


def read(folder: Path, data: str, topic: QuizTopic = CAPITALS) -> list[Question]:
    (folder / topic.file).write_text(data, encoding="utf-8")
    return read_quiz(folder, (topic,))


class TestExpansion:
    @pytest.mark.parametrize(
        ("pattern", "texts"),
        [
            ("Algiers", ["Algiers"]),
            ("La Paz|Sucre", ["La Paz", "Sucre"]),
            ("{The }Gambia", ["The Gambia", "Gambia"]),
            ("Wars[aw|zawa]", ["Warsaw", "Warszawa"]),
            ("Central Africa{n Rep{ublic}}", ["Central African Republic", "Central African Rep", "Central Africa"]),
            ("open[ed|]", ["opened", "open"]),
            ("Ed[w[ard|]|] [I|1]", ["Edward I", "Edward 1", "Edw I", "Edw 1", "Ed I", "Ed 1"]),
            ("{a{b}}|ab", ["ab", "a", ""]),
            (r"\[[0|1]-9\]", ["[0-9]", "[1-9]"]),
            ("", [""]),
        ],
    )
    def test_gives_every_text_in_order(self, pattern: str, texts: list[str]) -> None:
        assert list(expand(pattern)) == texts

    @settings(max_examples=300, deadline=None)
    @given(items())
    def test_is_the_language_of_the_pattern(self, alternatives: list[list[Item]]) -> None:
        texts = expand(write_pattern(alternatives))
        assert set(texts) == texts_of(alternatives)
        assert len(texts) == len(set(texts))

    @pytest.mark.parametrize("pattern", ["a]", "{a", "[a", "[a}", "{a]", "a|b}", "[Squares|n[**|^]2} base 8"])
    def test_brackets_must_match(self, pattern: str) -> None:
        with pytest.raises(ValueError, match=r"closes nothing|is not closed"):
            expand(pattern)

    def test_backslash_must_quote_something(self) -> None:
        with pytest.raises(ValueError, match="backslash ends"):
            expand("a\\")

    def test_does_not_explode(self) -> None:
        assert len(expand("[a|b]" * 12)) == 4096
        with pytest.raises(ValueError, match="more than 4096"):
            expand("[a|b]" * 13)


class TestFields:
    def test_colons_separate_unless_quoted(self) -> None:
        assert split_fields(r"1\:2:b::") == [r"1\:2", "b", "", ""]

    @settings(deadline=None)
    @given(st.lists(items(), min_size=1, max_size=3))
    def test_written_fields_come_back(self, fields: list[list[list[Item]]]) -> None:
        patterns = [write_pattern(field) for field in fields]
        assert split_fields(":".join(patterns)) == patterns


class TestReading:
    def test_asks_in_full_and_accepts_every_spelling(self, tmp_path: Path) -> None:
        questions = read(
            tmp_path,
            "C[^o|o^|o]te d'Ivoire:Yamoussoukro\n"
            "{DR |Democratic Republic of the }Congo:Kinshasa\n"
            "Mo[z|,c|c,|c]ambique:Maputo\n"
            "{{People's }Republic of }China:Beijing|Peking\n"
            "Portugal:Lisbo[n|a]\n"
            "Bra[z|s]il:Bras['i|i'|i]lia\n",
        )
        assert [(question.question, question.answers) for question in questions] == [
            ("What is the capital of Cote d'Ivoire?", ("Yamoussoukro",)),
            ("What is the capital of Democratic Republic of the Congo?", ("Kinshasa",)),
            ("What is the capital of Mozambique?", ("Maputo",)),
            ("What is the capital of People's Republic of China?", ("Beijing", "Peking")),
            ("What is the capital of Portugal?", ("Lisbon", "Lisboa")),
            ("What is the capital of Brazil?", ("Brasilia",)),
        ]
        assert {question.category for question in questions} == {"capitals"}

    def test_joins_continued_lines_and_picks_fields(self, tmp_path: Path) -> None:
        topic = QuizTopic("pres", "presidents", "Who followed {}?", 0, 3)
        data = "{J{ohn} }Adams:1797-1801:{T{homas} }Jefferson:\\\n{T{homas} }Jefferson\n{B{arack} }Obama:2009-:Biden:\n"
        (question,) = read(tmp_path, data, topic)
        assert question.question == "Who followed John Adams?"
        assert question.answers == ("Thomas Jefferson", "T Jefferson", "Jefferson")

    def test_alternatives_that_are_different_things_are_asked_one_by_one(self, tmp_path: Path) -> None:
        topic = QuizTopic("babies", "animals", "What is a young {} called?", 1, 0, separate=True)
        questions = read(tmp_path, "kitten:cat|fox\npup:seal|fox\n{wee }lamb:{wild }sheep\n", topic)
        assert {question.question: question.answers for question in questions} == {
            "What is a young cat called?": ("kitten",),
            "What is a young fox called?": ("kitten", "pup"),
            "What is a young seal called?": ("pup",),
            "What is a young wild sheep called?": ("wee lamb", "lamb"),
        }

    def test_same_question_of_two_files_is_asked_once(self, tmp_path: Path) -> None:
        (tmp_path / "asia").write_text("Turkey:Ankara\nRussia:Moscow\n")
        (tmp_path / "europe").write_text("Russia:Mos[cow|kva]\n")
        topics = [QuizTopic(name, name, CAPITALS.template, 0, 1) for name in ("asia", "europe")]
        assert read_quiz(tmp_path, tuple(topics)) == [
            Question("What is the capital of Turkey?", ("Ankara",), "asia"),
            Question("What is the capital of Russia?", ("Moscow", "Moskva"), "asia"),
        ]

    def test_leaves_out_answers_that_the_question_gives_away(self, tmp_path: Path) -> None:
        questions = read(tmp_path, "Singapore:Singapore\nMexico:Mexico City\nDjibouti:Djibouti|Jibuti\n")
        assert [question.answers for question in questions] == [("Mexico City",), ("Jibuti",)]

    def test_leaves_out_answers_too_short_to_mean_anything(self, tmp_path: Path) -> None:
        topic = QuizTopic("posneg", "opposites", "What is the opposite of {}?", 0, 1, separate=True)
        assert read(tmp_path, "out:in\nold:new|ok\n", topic) == [
            Question("What is the opposite of old?", ("new",), "opposites")
        ]

    def test_reads_the_first_rows_only(self, tmp_path: Path) -> None:
        topic = QuizTopic("elements", "elements", "Which element is {}?", 0, 1, rows=2)
        assert len(read(tmp_path, "\nHe:Helium\nLi:Lithium\nBe:Beryllium\n", topic)) == 2

    def test_accepts_both_spellings_of_an_element(self, tmp_path: Path) -> None:
        (question,) = read(tmp_path, "S:Sulphur\n")
        assert question.answers == ("Sulphur", "sulfur")

    @pytest.mark.parametrize(
        ("data", "message"), [("Algeria\n", "has 1 fields, not 2"), ("Egypt:{Cairo\n", "is not closed by '}'")]
    )
    def test_malformed_line_is_named(self, tmp_path: Path, data: str, message: str) -> None:
        with pytest.raises(QuestionError, match=message) as error:
            read(tmp_path, f"Kenya:Nai\\\nrobi\n{data}")
        assert "africa:3:" in str(error.value)

    def test_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(QuestionError, match="africa"):
            read_quiz(tmp_path)

    @given(st.lists(st.tuples(items(), items()), min_size=1, max_size=4))
    @settings(deadline=None)
    def test_no_question_contains_its_answer(self, rows: list[tuple[list[list[Item]], list[list[Item]]]]) -> None:
        data = "".join(f"Q{write_pattern(name)}:abc{write_pattern(answer)}\n" for name, answer in rows)
        with TemporaryDirectory() as folder:
            questions = read(Path(folder), data)
        for question in questions:
            for answer in question.answers:
                assert not contains_words(normalise(question.question), normalise(answer))
                assert len(normalise(answer)) >= MIN_ANSWER_LETTERS


def test_templates_take_exactly_one_name() -> None:
    assert len({topic.category for topic in TOPICS}) >= 8
    for topic in TOPICS:
        assert topic.template.count("{}") == 1
        assert topic.template.endswith("?")
