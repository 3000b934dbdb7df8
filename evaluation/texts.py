"""Texts that a model is measured on, and the windows they are cut into."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import LLM, InvalidRequest
from evaluation.errors import TextError

DEFAULT_CONTEXT = 1024
SUFFIXES = (".txt", ".md", ".jsonl")
HELD_OUT_FOLDER = "held_out"

Messages = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Text:
    """One kind of text.

    Attributes:
        name: Its name in tables.
        documents: Each a plain text, or the messages of a chat.
    """

    name: str
    documents: tuple[str | Messages, ...]


@dataclass(frozen=True, slots=True)
class TextWindows:
    """A text as a model reads it: windows that do not overlap.

    Attributes:
        name: The text's.
        windows: Token ids, at least two each. All but the first of each are counted: it has nothing before it.
    """

    name: str
    windows: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Tokens that are counted."""
        return sum(len(window) - 1 for window in self.windows)


def load_text(path: Path) -> Text:
    """Read one text.

    Args:
        path: A file, or a folder whose `*.txt`, `*.md` and `*.jsonl` files are read in the order of their paths. A
            JSONL file has one document a line, `{"text": "..."}` or `{"messages": [{"role": ..., "content": ...}]}`;
            any other file is a document in UTF-8.

    Raises:
        TextError: A file cannot be read, a line is malformed (file and line are named), or there is no document.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    else:
        files = [path]
    documents = tuple(document for file in files for document in _documents(file))
    if not documents:
        kinds = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
        raise TextError(f"{path} holds no text" + (f"; files of a folder must be {kinds}" if path.is_dir() else ""))
    return Text(_name(path), documents)


def _name(path: Path) -> str:
    """The path's last part; of a folder that only says it is held out, the one above it, which says of what."""
    resolved = path.resolve()
    return resolved.parent.name if resolved.name == HELD_OUT_FOLDER else resolved.name


def _documents(path: Path) -> Iterator[str | Messages]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"cannot read {path}: {error}") from error
    if path.suffix == ".jsonl":
        yield from (_parse(line, f"{path}:{i}") for i, line in enumerate(content.split("\n"), 1) if line.strip())
    elif content.strip():
        yield content


def _parse(line: str, place: str) -> str | Messages:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(f"{place}: no valid JSON: {error}") from error
    if not isinstance(record, dict) or ("text" in record) == ("messages" in record):
        raise TextError(f"{place}: must be an object with either 'text' or 'messages'")
    if "text" in record:
        if not isinstance(record["text"], str):
            raise TextError(f"{place}: 'text' must be a string, got {type(record['text']).__name__}")
        return record["text"]
    messages = record["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise TextError(f"{place}: 'messages' must be a list of at least one object with 'role' and 'content'")
    return tuple(messages)


def cut_into_windows(
    llm: LLM, text: Text, context: int = DEFAULT_CONTEXT, max_tokens: int | None = None
) -> TextWindows:
    """Cut a text's documents into windows of `context` tokens; the last one of a document may be shorter.

    Where the model wants texts to begin with a token of its own (BOS), every window does.

    Args:
        llm: The model whose tokenizer and chat template are used.
        text: The text.
        context: Tokens of a window, at least 2.
        max_tokens: Stop when so many tokens are counted; None takes the whole text.

    Raises:
        TextError: `context` is not in [2, the model's context], no document has two tokens, or the model has no chat
            template for a chat.
    """
    longest = llm.info.max_model_len
    if not 2 <= context <= longest:
        raise TextError(f"context must be in [2, {longest}], the model's context, got {context}")
    windows: list[tuple[int, ...]] = []
    counted = 0
    for window in _windows(llm, text, context):
        if max_tokens is not None:
            window = window[: max_tokens - counted + 1]
        if len(window) < 2:
            continue
        windows.append(window)
        counted += len(window) - 1
        if counted == max_tokens:
            break
    if not windows:
        raise TextError(f"text '{text.name}' has no document of at least 2 tokens")
    return TextWindows(text.name, tuple(windows))


def _windows(llm: LLM, text: Text, context: int) -> Iterator[tuple[int, ...]]:
    beginning = _beginning_of_texts(llm)
    for document in text.documents:
        try:
            if isinstance(document, str):
                start, tokens = beginning, llm.tokenizer.encode(document, add_special_tokens=False)
            else:
                start, tokens = [], llm.tokenizer.encode_chat(document, add_generation_prompt=False)
        except InvalidRequest as error:
            raise TextError(f"text '{text.name}': {error}") from error
        step = max(1, context - len(start))
        for first in range(0, len(tokens), step):
            yield (*start, *tokens[first : first + step])


def _beginning_of_texts(llm: LLM) -> Sequence[int]:
    """What the tokenizer puts before a text: BOS or nothing."""
    plain, marked = (llm.tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    return marked[: next((i for i in range(len(marked)) if marked[i : i + len(plain)] == plain), 0)]
