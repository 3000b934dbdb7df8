"""Documents of files and folders: plain text, Markdown, HTML, and JSONL of texts, chats or tokens."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import TextError
from training.html_text import html_to_text

PLAIN, HTML, JSONL = frozenset({".txt", ".md"}), frozenset({".html", ".htm"}), frozenset({".jsonl"})
SUFFIXES = PLAIN | HTML | JSONL
JSONL_FIELDS = ("token_ids", "messages", "text")  # the first that a line has is used


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages that the tokenizer's chat template turns into a text: `{"role": ..., "content": ...}`."""

    messages: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A text that is tokenized already."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        name: Path inside its source's folder (the file's name, for a file), with `:LINE` for a line of a JSONL file.
        content: What it says.
    """

    name: str
    content: str | Chat | TokenIds


def read_documents(path: Path) -> Iterator[Document]:
    """Read the documents of a file, or of all files below a folder in the order of their names.

    A `.txt`, `.md`, `.html` or `.htm` file is one document; a `.jsonl` file has one on each line that is not empty, an
    object with `"token_ids"` (a list of integers), `"messages"` (a list of objects with a role) or `"text"`, the first
    of these that it has. Each may be compressed (`.gz`). Other files and hidden ones in a folder are left out.

    Raises:
        TextError: The path does not exist, has no readable file, or a file is malformed; names file and line.
    """
    if path.is_dir():
        files = _files_below(path)
        if not files:
            raise TextError(f"no file in this folder ends in {_allowed()}", path)
        for file in files:
            yield from _read_file(file, file.relative_to(path).as_posix())
    elif not path.exists():
        raise TextError("no such file or folder", path)
    elif _suffix(path) not in SUFFIXES:
        raise TextError(f"cannot tell what kind of text this is; its name must end in {_allowed()}", path)
    else:
        yield from _read_file(path, path.name)


def read_text(path: Path) -> str:
    """Read a UTF-8 file, decompressed if it ends in `.gz`.

    Raises:
        TextError: It cannot be read or decompressed, or is not UTF-8; names the line.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise TextError(f"cannot read it: {error}", path) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise TextError(f"not UTF-8 (byte 0x{data[error.start]:02x})", path, line) from error


def _files_below(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and _suffix(path) in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _read_file(path: Path, name: str) -> Iterator[Document]:
    suffix = _suffix(path)
    text = read_text(path)
    if suffix in JSONL:
        # Not splitlines: it also splits at characters such as U+2028 that may stand inside a JSON string.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield Document(f"{name}:{number}", _parse_line(line, path, number))
    else:
        yield Document(name, html_to_text(text) if suffix in HTML else text)


def _parse_line(line: str, path: Path, number: int) -> str | Chat | TokenIds:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise TextError(f"not JSON: {error.msg} at column {error.colno}", path, number) from error
    except RecursionError:
        raise TextError("not usable JSON: nested too deeply", path, number) from None
    field = next((field for field in JSONL_FIELDS if isinstance(value, dict) and field in value), None)
    match field, value[field] if field else None:
        case "token_ids", list() as ids if ids and all(type(i) is int and i >= 0 for i in ids):
            return TokenIds(tuple(ids))
        case "messages", list() as messages if messages and all(isinstance(m, dict) and "role" in m for m in messages):
            return Chat(tuple(messages))
        case "text", str() as text:
            return text
        case None, _:
            raise TextError(f"a line must be an object with one of {', '.join(JSONL_FIELDS)}", path, number)
        case _:
            kinds = {
                "token_ids": "a list of integers of at least 0, not empty",
                "messages": 'a list of objects with a "role", not empty',
                "text": "a string",
            }
            raise TextError(f"{field} must be {kinds[str(field)]}", path, number)


def _suffix(path: Path) -> str:
    """The suffix that says what a file is: `.txt` of `a.txt.gz`."""
    lower = path.name.lower()
    return Path(lower.removesuffix(".gz")).suffix


def _allowed() -> str:
    return ", ".join(sorted(SUFFIXES)) + " (or one of these and .gz)"
