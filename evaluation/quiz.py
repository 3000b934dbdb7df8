"""Open questions from the data of quiz(6), the BSD quiz program; Debian ships it in the package `bsdgames`.

A data file has one line for each item, its fields separated by colons. A field is a pattern: `a|b` are alternatives,
`{x}` is optional, `[..]` groups, a backslash quotes a character or, at the end of a line, continues it.

The facts are those of the data (Swaziland, Astana, presidents up to 2009): a model is asked what was true then.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from evaluation.errors import QuestionError
from evaluation.questions import Question, contains_words, normalise

QUIZ_LICENCE = (
    "3-clause BSD, copyright 1980-1994 The Regents of the University of California "
    "(debian/copyright of bsdgames: data files without a notice of their own fall under the UCB or NetBSD terms)"
)
MAX_EXPANSIONS = 4096
MIN_ANSWER_LETTERS = 3  # shorter ones ("up", "on", "TR") occur in any text by chance
# Accents are ASCII marks in some of several alternatives: C[^o|o^|o]te. The apostrophe of "People's" is none.
_MARK = re.compile(r"[\^~,/°]|'(?!s\b)")


@dataclass(frozen=True, slots=True)
class QuizTopic:
    """How the lines of one file become questions.

    Attributes:
        file: Name of the data file.
        category: Category of the questions.
        template: The question; `{}` takes the given field.
        given: Index of the field that is asked about.
        asked: Index of the field that is the answer.
        separate: The given field's alternatives are different things (lion, tiger), so each makes a question of its
            own; else they are names of one thing.
        rows: Use at most this many lines, the file's first; None uses all.
    """

    file: str
    category: str
    template: str
    given: int
    asked: int
    separate: bool = False
    rows: int | None = None


CAPITAL = "What is the capital of {}?"
TOPICS = (
    QuizTopic("africa", "capitals of Africa", CAPITAL, 0, 1),
    QuizTopic("america", "capitals of the Americas", CAPITAL, 0, 1),
    QuizTopic("asia", "capitals of Asia", CAPITAL, 0, 1),
    QuizTopic("europe", "capitals of Europe", CAPITAL, 0, 1),
    QuizTopic("province", "capitals of Canada's provinces", CAPITAL, 0, 1),
    QuizTopic("state", "capitals of US states", "What is the capital of the US state of {}?", 0, 1),
    QuizTopic("elements", "chemical elements", "Which chemical element has the symbol {}?", 0, 3, rows=54),
    QuizTopic("pres", "US presidents", "Who followed {} as President of the United States?", 0, 3),
    QuizTopic("babies", "young animals", "What is a young {} called?", 1, 0, separate=True),
    QuizTopic("posneg", "opposites", 'What is the opposite of "{}"?', 0, 1, separate=True),
    QuizTopic("sexes", "female counterparts", 'What is the female counterpart of "{}"?', 0, 1, separate=True),
)
# The data spell some names one way only.
SPELLINGS = {"aluminum": "aluminium", "sulphur": "sulfur", "cesium": "caesium", "lilly": "lily"}


def read_quiz(folder: Path, topics: tuple[QuizTopic, ...] = TOPICS) -> list[Question]:
    """Open questions from the folder `usr/share/games/bsdgames/quiz` of the Debian package `bsdgames`.

    Lines that lack a field are left out, and answers that the question gives away or that are too short to be found
    in a text by more than chance. Lines that ask the same question are merged; the first names its category.

    Args:
        folder: Folder with the data files.
        topics: Which files to read, and how.

    Returns:
        Questions in the order of topics and lines, no two alike.

    Raises:
        QuestionError: A file is missing or malformed; file and line are named.
    """
    found: dict[str, Question] = {}
    for topic in topics:
        for question in _read_topic(folder / topic.file, topic):
            known = found.setdefault(question.question.casefold(), question)
            if known is not question:
                answers = tuple(dict.fromkeys((*known.answers, *question.answers)))
                found[known.question.casefold()] = Question(known.question, answers, known.category)
    return list(found.values())


def expand(pattern: str) -> tuple[str, ...]:
    """All texts that a pattern stands for, optional parts first with and then without, no two alike.

    Raises:
        ValueError: Brackets do not match, a backslash ends the pattern, or there are more than 4,096 texts.
    """
    return tuple(dict.fromkeys(text for texts in _alternatives(pattern) for text in texts))


def split_fields(line: str) -> list[str]:
    """Patterns of a line, separated by colons that no backslash quotes."""
    fields, start, place = [], 0, 0
    while place < len(line):
        if line[place] == "\\":
            place += 1
        elif line[place] == ":":
            fields.append(line[start:place])
            start = place + 1
        place += 1
    return [*fields, line[start:]]


def _alternatives(pattern: str) -> list[list[str]]:
    """Texts of each top-level alternative."""
    parser = _PatternParser(pattern)
    alternatives = parser.alternatives()
    if parser.place < len(pattern):
        raise ValueError(f"'{pattern[parser.place]}' closes nothing in {pattern!r}")
    return alternatives


class _PatternParser:
    """Recursive descent over one pattern; `place` is the index of the next character."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.place = 0

    def alternatives(self) -> list[list[str]]:
        """`sequence|sequence|...`, up to a closing bracket or the end; the texts of each."""
        found = [self._sequence()]
        while self._next_is("|"):
            self.place += 1
            found.append(self._sequence())
        return found

    def _sequence(self) -> list[str]:
        texts = [""]
        while self.place < len(self.pattern) and not self._next_is("|]}"):
            texts = self._append(texts, self._item())
        return texts

    def _item(self) -> list[str]:
        """Texts of one character or of one pair of brackets."""
        character = self.pattern[self.place]
        self.place += 1
        if character == "\\":
            if self.place == len(self.pattern):
                raise ValueError(f"a backslash ends {self.pattern!r}")
            self.place += 1
            return [self.pattern[self.place - 1]]
        if character not in "[{":
            return [character]
        closing = "]" if character == "[" else "}"
        texts = [text for alternative in self.alternatives() for text in alternative]
        if not self._next_is(closing):
            raise ValueError(f"'{character}' is not closed by '{closing}' in {self.pattern!r}")
        self.place += 1
        return texts if closing == "]" else [*texts, ""]

    def _next_is(self, characters: str) -> bool:
        return self.place < len(self.pattern) and self.pattern[self.place] in characters

    def _append(self, heads: list[str], tails: list[str]) -> list[str]:
        if len(heads) * len(tails) > MAX_EXPANSIONS:
            raise ValueError(f"{self.pattern!r} stands for more than {MAX_EXPANSIONS} texts")
        return [head + tail for head, tail in product(heads, tails)]


def _read_topic(path: Path, topic: QuizTopic) -> Iterator[Question]:
    for row, (number, line) in enumerate(_logical_lines(path)):
        if topic.rows is not None and row >= topic.rows:
            return
        fields = split_fields(line)
        if max(topic.given, topic.asked) >= len(fields):
            raise QuestionError(f"{path}:{number}: has {len(fields)} fields, not {max(topic.given, topic.asked) + 1}")
        given, asked = fields[topic.given], fields[topic.asked]
        if not given or not asked:
            continue
        try:
            names, answers = _names(given, topic.separate), _answers(asked)
        except ValueError as error:
            raise QuestionError(f"{path}:{number}: {error}") from error
        for name in names:
            question = topic.template.format(name)
            hidden = tuple(answer for answer in answers if not contains_words(normalise(question), normalise(answer)))
            if hidden:
                yield Question(question, hidden, topic.category)


def _logical_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number of its first line, line) with continuation lines joined; empty ones left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise QuestionError(f"cannot read quiz data from {path}: {error}") from error
    start, joined = 1, ""
    for number, line in enumerate(lines, 1):
        joined += line
        quoting = len(joined) - len(joined.rstrip("\\"))
        if quoting % 2 and number < len(lines):
            joined = joined[:-1]
            continue
        if joined:
            yield start, joined
        start, joined = number + 1, ""


def _names(pattern: str, separate: bool) -> list[str]:
    """How a question calls the thing: in full, without marks of accents, one name or one for each alternative."""
    groups = _alternatives(pattern) if separate else [list(expand(pattern))]
    names = [max(_plainest(texts), key=len).strip() for texts in groups]
    return [name for name in names if name]


def _answers(pattern: str) -> tuple[str, ...]:
    """Accepted answers, no two alike once normalised."""
    by_form: dict[str, str] = {}
    for text in _plainest(list(expand(pattern))):
        for answer in (text.strip(), SPELLINGS.get(text.strip().casefold())):
            if answer and len(normalise(answer)) >= MIN_ANSWER_LETTERS:
                by_form.setdefault(normalise(answer), answer)
    return tuple(by_form.values())


def _plainest(texts: list[str]) -> list[str]:
    """The texts that have the fewest marks of accents."""
    marks = [len(_MARK.findall(text)) for text in texts]
    fewest = min(marks)
    return [text for text, count in zip(texts, marks, strict=True) if count == fewest]
