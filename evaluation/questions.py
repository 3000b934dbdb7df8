"""Open questions with their accepted answers, and when a text counts as one of them."""

import json
import re
import string
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluation.errors import QuestionError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# U.S. and US, St John's and St Johns are the same name; other punctuation separates words.
_DROPPED = str.maketrans("", "", ".'’`")
_PUNCTUATION = re.compile(rf"[{re.escape(string.punctuation)}]|[^\w\s]")


def normalise(text: str) -> str:
    """A text as answers are compared: lower case, without articles, accents and punctuation, single spaces.

    As the SQuAD evaluation script (Rajpurkar et al. 2016, arXiv 1606.05250), and beyond it: accents are dropped, and
    a hyphen separates words instead of joining them, so that "Port-au-Prince" is "Port au Prince".
    """
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(character for character in decomposed if not unicodedata.combining(character))
    words = _ARTICLES.sub(" ", _PUNCTUATION.sub(" ", plain.translate(_DROPPED)))
    return " ".join(words.split())


def contains_words(text: str, words: str) -> bool:
    """Whether `words` occur in `text` as whole words; both are normalised already."""
    return bool(words) and f" {words} " in f" {text} "


@dataclass(frozen=True)
class Question:
    """An open question.

    Attributes:
        question: The question as it is put to a model.
        answers: Accepted answers; each is one on its own.
        category: What kind of question it is; results are also reported by category.
    """

    question: str
    answers: tuple[str, ...]
    category: str = ""

    @cached_property
    def _accepted(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(filter(None, map(normalise, self.answers))))

    def contained_in(self, text: str) -> bool:
        """Whether an accepted answer occurs in `text` as whole words."""
        text = normalise(text)
        return any(contains_words(text, answer) for answer in self._accepted)

    def equals(self, text: str) -> bool:
        """Whether `text` is an accepted answer and nothing else."""
        return normalise(text) in self._accepted


def load_questions(path: Path) -> list[Question]:
    """Read questions from a JSONL file.

    Each line is an object: `{"question": "...", "answers": ["...", ...]}` or `{"question": "...", "answer": "..."}`,
    with `"category": "..."` if there are kinds. Other keys are ignored, and so are empty lines.

    Raises:
        QuestionError: The file cannot be read, holds no question, or a line is malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise QuestionError(f"cannot read questions from {path}: {error}") from error
    questions = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise QuestionError(f"{path} holds no questions")
    return questions


def _parse(line: str, place: str) -> Question:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise QuestionError(f"{place}: no valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise QuestionError(f"{place}: must be an object with 'question' and 'answers', got {type(record).__name__}")
    if ("answers" in record) == ("answer" in record):
        raise QuestionError(f"{place}: must have either 'answers', a list of strings, or 'answer', a string")
    key = "answers" if "answers" in record else "answer"
    answers = record[key] if key == "answers" else [record[key]]
    if not isinstance(answers, list) or not answers:
        raise QuestionError(f"{place}: 'answers' must be a list of at least one string, got {answers!r}")
    for answer in answers:
        if not isinstance(answer, str) or not normalise(answer):
            raise QuestionError(f"{place}: '{key}' must hold text with at least one letter or digit, got {answer!r}")
    question, category = record.get("question"), record.get("category", "")
    if not isinstance(question, str) or not question.strip():
        raise QuestionError(f"{place}: 'question' must be a string that is not empty, got {question!r}")
    if not isinstance(category, str):
        raise QuestionError(f"{place}: 'category' must be a string, got {category!r}")
    return Question(question.strip(), tuple(answers), category)
