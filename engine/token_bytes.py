"""The bytes that each token stands for.

Text is the UTF-8 decoding of its tokens' bytes. Knowing the bytes, not the text, of a token makes incremental decoding
exact and cheap: a character split over tokens is simply a few bytes that are not complete yet.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend

from engine.errors import ModelLoadError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """What the tokens of a vocabulary stand for.

    Attributes:
        all: Bytes of each token id.
        visible: The same with nothing for special tokens, which are hidden from users.
        prefix_spaces: Spaces that encoding puts in front of a text and that decoding takes away again (SentencePiece).
    """

    all: tuple[bytes, ...]
    visible: tuple[bytes, ...]
    prefix_spaces: int


def token_bytes(backend: Backend) -> TokenBytes:
    """Work out the bytes of every token from the decoder that the tokenizer declares.

    Args:
        backend: A tokenizer whose decoder is ByteLevel, Metaspace, a sequence of Replace, ByteFallback, Fuse and Strip,
            or missing (tokens are words then).

    Raises:
        ModelLoadError: The decoder is of another kind.
    """
    vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    added: dict[int, Any] = backend.get_added_tokens_decoder()
    spell, prefix_spaces = _spelling(_decoder_steps(backend))
    pieces = [b""] * (max(vocab.values(), default=-1) + 1)
    if spell is _spell_byte_level:  # added tokens are matched in raw text: they are not written in its alphabet
        for token_id, token in added.items():
            vocab.pop(token.content, None)
            pieces[token_id] = token.content.encode()
    for token_id, piece in zip(vocab.values(), spell(list(vocab)), strict=True):
        pieces[token_id] = piece
    visible = pieces.copy()
    for token_id, token in added.items():
        if token.special:
            visible[token_id] = b""
    return TokenBytes(tuple(pieces), tuple(visible), prefix_spaces)


def _decoder_steps(backend: Backend) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    decoder: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _spelling(steps: list[dict[str, Any]]) -> tuple[Callable[[list[str]], list[bytes]], int]:
    """What makes bytes of all tokens, and `prefix_spaces`."""
    if not steps:
        return (lambda tokens: [f" {token}".encode() for token in tokens]), 1  # words, joined by spaces
    if len(steps) == 1 and steps[0]["type"] == "ByteLevel":
        return _spell_byte_level, 0
    replacements: list[tuple[str, str]] = []
    byte_fallback, prefix_spaces = False, 0
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old), "prepend_scheme": scheme}:
                replacements.append((old, " "))
                prefix_spaces = 0 if scheme == "never" else 1
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                prefix_spaces = start
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case _:
                raise ModelLoadError(
                    f"tokenizer decoder {step['type']} is not supported as it is used here; supported are ByteLevel, "
                    "Metaspace, and Replace, ByteFallback, Fuse and Strip as SentencePiece models have them"
                )

    def spell(token: str) -> bytes:
        if byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return (lambda tokens: [spell(token) for token in tokens]), prefix_spaces


def _byte_level_table() -> NDArray[np.int16]:
    """GPT-2's printable alphabet: the byte that each character stands for, -1 for those outside it, as is the last one.

    Printable Latin-1 characters stand for themselves, the other 68 bytes are written as characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    table = np.full(0x100 + len(others) + 1, -1, np.int16)
    table[printable] = printable
    table[0x100:-1] = others
    return table


_BYTE_LEVEL = _byte_level_table()


def _spell_byte_level(tokens: list[str]) -> list[bytes]:
    """All in one go, far faster than one by one: a character is a byte."""
    characters = np.frombuffer("".join(tokens).encode("utf-32-le"), np.uint32)
    found = _BYTE_LEVEL[np.minimum(characters, len(_BYTE_LEVEL) - 1)]
    spelled = found.astype(np.uint8).tobytes()
    bounds = list(accumulate(map(len, tokens), initial=0))
    pieces = [spelled[start:end] for start, end in pairwise(bounds)]
    # A token with a character that is not in the alphabet stands for itself.
    for index in set((np.searchsorted(bounds, np.flatnonzero(found < 0), side="right") - 1).tolist()):
        pieces[index] = tokens[index].encode()
    return pieces
