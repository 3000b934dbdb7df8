"""Texts that a model wrote, and the JSONL file that they are kept in.

Texts come in batches. Each line of the file says which batch it belongs to and how many texts that has, so that a run
which was killed leaves only whole batches behind, and the next one goes on after them.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.errors import GenerationError


@dataclass(frozen=True, slots=True)
class Conversation:
    """A message and its answer, both written by the model.

    Attributes:
        user: The message; "" for a document that answers nothing.
        answer: The answer, or the document.
        token_ids: Tokens of the whole, exactly as they were sampled: template, message, answer, end of text if reached.
        text: The same as text, special tokens spelled out.
        finished: Whether the answer reached its end, not only the limit of its length.
    """

    user: str
    answer: str
    token_ids: tuple[int, ...]
    text: str
    finished: bool

    @property
    def spoken(self) -> str:
        """Message and answer without what the template adds to every conversation."""
        return f"{self.user}\n\n{self.answer}"


@dataclass(slots=True)
class Progress:
    """What a file holds already."""

    next_batch: int = 0
    num_conversations: int = 0
    num_tokens: int = 0
    users: set[str] = field(default_factory=set)

    def add(self, batch: int, conversations: Sequence[Conversation]) -> None:
        """Count a batch that was written."""
        self.next_batch = batch + 1
        self.num_conversations += len(conversations)
        self.num_tokens += sum(len(conversation.token_ids) for conversation in conversations)
        self.users.update(conversation.user for conversation in conversations)


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Read a file of conversations.

    Raises:
        GenerationError: The file cannot be read or has a line that is no conversation; names the line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise GenerationError(f"{path}: cannot read it: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line:
            yield _parse(line, path, number)[1]


def resume(path: Path, seed: int) -> Progress:
    """Find out what a file holds, and cut off a batch that is not complete. The file need not exist.

    Raises:
        GenerationError: The file was written with another seed, or has a line that is no conversation.
    """
    progress = Progress()
    if not path.exists():
        return progress
    kept = end = 0
    batch: list[Conversation] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            record, conversation = _parse(line, path, number)
            if record["seed"] != seed:
                raise GenerationError(f"{path} was written with seed {record['seed']}, not {seed}; use another file")
            end += len(line)
            batch.append(conversation)
            if len(batch) == record["of"]:
                progress.add(record["batch"], batch)
                kept, batch = end, []
    os.truncate(path, kept)
    return progress


def append_batch(path: Path, seed: int, batch: int, conversations: Sequence[Conversation]) -> None:
    """Add a batch to the end of a file."""
    place = {"seed": seed, "batch": batch, "of": len(conversations)}
    lines = [
        json.dumps(
            place
            | {
                "user": conversation.user,
                "answer": conversation.answer,
                "finished": conversation.finished,
                "text": conversation.text,
                "token_ids": conversation.token_ids,
            },
            ensure_ascii=False,
        )
        for conversation in conversations
    ]
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)


def _parse(line: bytes, path: Path, number: int) -> tuple[dict[str, Any], Conversation]:
    try:
        record = json.loads(line)
        conversation = Conversation(
            record["user"], record["answer"], tuple(record["token_ids"]), record["text"], record["finished"]
        )
        record["seed"], record["batch"], record["of"]
    except (ValueError, KeyError, TypeError) as error:
        raise GenerationError(f"{path}:{number}: no conversation that this program wrote: {error!r}") from error
    return record, conversation
