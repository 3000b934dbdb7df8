"""Text to train on: from files to batches of token ids.

A `TextSource` names a file or folder; its documents become one array of tokens (`TokenizedText`); `TextMixture` draws
batches from several of these. What batch a step gets depends on the seed and the step alone, so training can go on at
any step.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine import InvalidRequest
from training.documents import Chat, Document, TokenIds, read_documents
from training.errors import TextError

ENCODE_BATCH = 64  # documents that are encoded at once


class TextTokenizer(Protocol):
    """What is asked of a tokenizer. `engine.LLM.tokenizer` has it; `TransformersTokenizer` adapts transformers'."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """Ids that end a text; the first one separates documents."""

    def encode(self, text: str, /) -> list[int]:
        """Token ids of a text, with BOS where the model wants it."""

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], /, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of chat messages as the model's template writes them."""


@runtime_checkable
class BatchEncoder(Protocol):
    """A tokenizer that encodes several texts at once, which is faster on more than one core."""

    def encode_batch(self, texts: Sequence[str], /) -> list[list[int]]:
        """Token ids of each text, the same as of `encode`."""


class TransformersTokenizer:
    """A tokenizer of transformers as a `TextTokenizer`.

    Args:
        tokenizer: A fast tokenizer (`PreTrainedTokenizerFast`) with an EOS token.

    Raises:
        TextError: It has no EOS token, so documents could not be told apart.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise TextError("the tokenizer has no eos token, which must stand between documents")
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.eos_token_ids = (int(tokenizer.eos_token_id),)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with BOS where the model wants it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts."""
        # verbose=False: a document longer than the model's context is no mistake here.
        return cast(list[list[int]], self._tokenizer(list(texts), verbose=False)["input_ids"])

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of chat messages.

        Raises:
            TextError: The tokenizer has no chat template, or it rejects the messages.
        """
        try:
            ids = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=False,
            )
        except Exception as error:  # a template is a program of the checkpoint's author: it may raise anything
            raise TextError(f"the chat template rejects the messages: {error}") from error
        return cast(list[int], ids)


@dataclass(frozen=True, slots=True)
class TextSource:
    """A file or folder of text, and how much of it a batch gets.

    Attributes:
        path: File or folder, see `read_documents`.
        weight: Share of the sequences of a batch, relative to the other sources' weights.

    Raises:
        TextError: `weight` is not a finite number above 0.
    """

    path: Path
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight <= 0:
            raise TextError(f"weight must be a finite number above 0, got {self.weight:g}", self.path)

    @classmethod
    def parse(cls, text: str) -> "TextSource":
        """Read `"PATH"` or `"PATH:WEIGHT"`. A colon that no number follows is a part of the path, and so is one in the
        name of a file that exists.

        Raises:
            TextError: The path is empty or the weight is not a finite number above 0.
        """
        path, colon, number = text.rpartition(":")
        weight = _number(number) if colon and not Path(text).exists() else None
        if weight is None:
            path, weight = text, 1.0
        if not path:
            raise TextError(f"a text source is PATH or PATH:WEIGHT, got {text!r}")
        return cls(Path(path), weight)


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedText:
    """All documents of a source, each ended by one EOS token.

    Attributes:
        name: The source's name, for messages.
        token_ids: uint32 [num_tokens].
    """

    name: str
    token_ids: NDArray[np.uint32]

    @classmethod
    def from_documents(cls, name: str, documents: Iterable[Document], tokenizer: TextTokenizer) -> "TokenizedText":
        """Tokenize documents, in their order.

        Raises:
            TextError: A document's chat is rejected by the template, or its token ids are outside the vocabulary.
        """
        end = tokenizer.eos_token_ids[0]
        texts = (ids if ids[-1] == end else [*ids, end] for ids in _encode_all(documents, tokenizer) if ids)
        parts = [np.empty(0, np.uint32), *(np.asarray(ids, dtype=np.uint32) for ids in texts)]
        return cls(name, np.concatenate(parts))

    @classmethod
    def from_path(cls, path: Path, tokenizer: TextTokenizer) -> "TokenizedText":
        """Read and tokenize a file or folder.

        Raises:
            TextError: As `read_documents` and `from_documents`.
        """
        return cls.from_documents(str(path), read_documents(path), tokenizer)

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)


class TextMixture:
    """Batches drawn from several texts.

    Args:
        texts: The texts and their weights, relative to each other.
        seed: Another seed gives other batches; at least 0.

    Raises:
        TextError: There is no text, a weight is not a finite number above 0, or `seed` is negative.
    """

    def __init__(self, texts: Sequence[tuple[TokenizedText, float]], seed: int) -> None:
        if not texts:
            raise TextError("there is no text to train on")
        if seed < 0:
            raise TextError(f"seed must be at least 0, got {seed}")
        for text, weight in texts:
            if not math.isfinite(weight) or weight <= 0:
                raise TextError(f"{text.name}: weight must be a finite number above 0, got {weight:g}")
        self._texts = tuple(text for text, _ in texts)
        weights = np.array([weight for _, weight in texts], dtype=np.float64)
        self._bounds = np.cumsum(weights / weights.sum())
        self._seed = seed

    @classmethod
    def from_sources(cls, sources: Sequence[TextSource], tokenizer: TextTokenizer, seed: int) -> "TextMixture":
        """Read and tokenize sources.

        Raises:
            TextError: As `TokenizedText.from_path`, or there is no source.
        """
        return cls([(TokenizedText.from_path(source.path, tokenizer), source.weight) for source in sources], seed)

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(len(text) for text in self._texts)

    def batch(self, step: int, batch_size: int, sequence_length: int) -> Tensor:
        """Sequences of a step, a pure function of the seed and the arguments.

        Each text gets its share of the sequences, rounded down or up by chance so that the mean is exact; which part of
        the text a sequence is, is uniformly random.

        Args:
            step: At least 0.
            batch_size: Number of sequences.
            sequence_length: Tokens of each.

        Returns:
            int64 [batch_size, sequence_length], on the CPU.

        Raises:
            TextError: A text is shorter than `sequence_length`.
        """
        for text in self._texts:
            if len(text) < sequence_length:
                raise TextError(
                    f"{text.name} has {len(text)} tokens, fewer than one sequence of {sequence_length}; give it more "
                    "text or train on shorter sequences"
                )
        # The bit generator itself, as its words, unlike what numpy's Generator makes of them, never change between
        # versions of numpy.
        words = np.random.PCG64(np.random.SeedSequence([self._seed, step])).random_raw(1 + 2 * batch_size)
        owners = self._draw_texts(words[0], batch_size)
        owners = owners[np.argsort(words[1 : 1 + batch_size], kind="stable")]
        batch = np.empty((batch_size, sequence_length), dtype=np.int64)
        for row, owner, word in zip(batch, owners, words[1 + batch_size :], strict=True):
            token_ids = self._texts[owner].token_ids
            start = int(word) % (len(token_ids) - sequence_length + 1)  # the bias is below 1e-9 for any text
            row[:] = token_ids[start : start + sequence_length]
        return torch.from_numpy(batch)

    def _draw_texts(self, word: np.uint64, batch_size: int) -> NDArray[np.int64]:
        """Index of each sequence's text, [batch_size], sorted: systematic sampling with one random number."""
        points = (np.arange(batch_size) + (int(word) >> 11) * 2.0**-53) / batch_size
        return np.minimum(np.searchsorted(self._bounds, points, side="right"), len(self._texts) - 1)


def split_documents(documents: Iterable[Document], held_out: Sequence[str]) -> tuple[list[Document], list[Document]]:
    """Split documents into those to train on and those held out.

    Args:
        documents: In any order, which is kept.
        held_out: Glob patterns (`*` matches `/` too) of the names of documents to hold out.

    Returns:
        Documents to train on, documents held out.

    Raises:
        TextError: A pattern matches no document: a slip that would otherwise train on what is evaluated.
    """
    train: list[Document] = []
    held: list[Document] = []
    unmatched = set(held_out)
    for document in documents:
        matching = {pattern for pattern in held_out if fnmatchcase(document.name, pattern)}
        unmatched -= matching
        (held if matching else train).append(document)
    if unmatched:
        patterns = ", ".join(repr(pattern) for pattern in sorted(unmatched))
        raise TextError(f"no document has a name that matches the held-out pattern {patterns}")
    return train, held


def _encode_all(documents: Iterable[Document], tokenizer: TextTokenizer) -> Iterator[Sequence[int]]:
    """Token ids of each document, in order; plain texts that follow each other are encoded together."""
    texts: list[str] = []
    for document in documents:
        if isinstance(document.content, str):
            texts.append(document.content)
            if len(texts) < ENCODE_BATCH:
                continue
        yield from _encode_texts(texts, tokenizer)
        texts = []
        match document.content:
            case Chat(messages):
                yield _encode_chat(document.name, messages, tokenizer)
            case TokenIds(ids):
                yield _check_ids(document.name, ids, tokenizer.vocab_size)
    yield from _encode_texts(texts, tokenizer)


def _encode_texts(texts: list[str], tokenizer: TextTokenizer) -> list[list[int]]:
    if texts and isinstance(tokenizer, BatchEncoder):
        return tokenizer.encode_batch(texts)
    return [tokenizer.encode(text) for text in texts]


def _encode_chat(name: str, messages: Sequence[Mapping[str, Any]], tokenizer: TextTokenizer) -> list[int]:
    try:
        return tokenizer.encode_chat(messages, add_generation_prompt=False)
    except (TextError, InvalidRequest) as error:
        raise TextError(f"{name}: {error}") from error


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> Sequence[int]:
    largest = max(ids)
    if largest >= vocab_size:
        raise TextError(
            f"{name}: token id {largest} is outside the vocabulary of {vocab_size} tokens; these tokens are of another "
            "tokenizer"
        )
    return ids


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
