"""How much of held-out text occurs in training text, and training text without it.

Texts are compared in runs of words: lower case, without punctuation. 13 words in a row do not repeat by chance, but do
in a quotation.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from training.errors import CorpusError

NGRAM = 13
_WORD = re.compile(r"\w+")
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd: no word is lost from the 64-bit hash


class HeldOutText:
    """Runs of `n` words that occur in held-out text.

    Args:
        texts: The held-out texts.
        n: Words of a run.

    Raises:
        CorpusError: No text has `n` words, so nothing could be found.
    """

    def __init__(self, texts: Iterable[str], n: int = NGRAM) -> None:
        self._n = n
        self._codes: dict[str, int] = {}
        self._runs = np.concatenate([np.empty(0, np.uint64), *(self._hash(text) for text in texts)])
        if not len(self._runs):
            raise CorpusError(f"held-out text must have {n} words in a row")
        self._distinct = np.unique(self._runs)

    def overlap(self, train_texts: Iterable[str]) -> float:
        """Share of the held-out runs of words that occur in training texts, in [0, 1]."""
        found = np.zeros(len(self._distinct), dtype=bool)
        for text in train_texts:
            places, matches = self._find(self._hash(text))
            found[places[matches]] = True
        return float(np.mean(found[np.searchsorted(self._distinct, self._runs)]))

    def occurs_in(self, text: str) -> bool:
        """Whether a text has a run of words that is held out."""
        return bool(self._find(self._hash(text))[1].any())

    def remove_from(self, text: str) -> tuple[str, int]:
        """A text without the paragraphs that hold a held-out run of words. Nothing of the held-out text is left.

        Returns:
            The text, number of paragraphs removed.
        """
        paragraphs = text.split("\n\n")
        kept = [paragraph for paragraph in paragraphs if not self.occurs_in(paragraph)]
        # Runs over several paragraphs, as in a list. Only now: what merely stands beside a quotation is to be kept.
        while touched := self._touched(kept):
            kept = [paragraph for number, paragraph in enumerate(kept) if number not in touched]
        return "\n\n".join(kept), len(paragraphs) - len(kept)

    def _touched(self, paragraphs: Sequence[str]) -> set[int]:
        """Numbers of the paragraphs that a held-out run of words touches."""
        ends = np.cumsum([len(_words(paragraph)) for paragraph in paragraphs])
        first = np.flatnonzero(self._find(self._hash("\n\n".join(paragraphs)))[1])
        firsts, lasts = (np.searchsorted(ends, place, side="right") for place in (first, first + self._n - 1))
        return {number for pair in zip(firsts, lasts, strict=True) for number in range(pair[0], pair[1] + 1)}

    def _find(self, runs: NDArray[np.uint64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Where each run stands among the distinct held-out ones, if it does: places [runs], matches [runs]."""
        places = np.minimum(np.searchsorted(self._distinct, runs), len(self._distinct) - 1)
        return places, self._distinct[places] == runs

    def _hash(self, text: str) -> NDArray[np.uint64]:
        """64-bit hash of each run of `n` words, [max(words - n + 1, 0)]."""
        codes = self._codes
        words = np.array([codes.setdefault(word, len(codes) + 1) for word in _words(text)], dtype=np.uint64)
        runs = max(len(words) - self._n + 1, 0)
        result = np.zeros(runs, dtype=np.uint64)
        multiplier = np.uint64(_MULTIPLIER)
        for offset in range(self._n if runs else 0):
            # The hash wraps around: unsigned arithmetic modulo 2^64.
            result = result * multiplier + words[offset : offset + runs] * multiplier
            result ^= result >> np.uint64(29)
        return result


def overlap(train_texts: Iterable[str], held_out_texts: Sequence[str], n: int = NGRAM) -> float:
    """Share of the runs of `n` words of held-out texts that occur in training texts, in [0, 1].

    Raises:
        CorpusError: No held-out text has `n` words.
    """
    return HeldOutText(held_out_texts, n).overlap(train_texts)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
