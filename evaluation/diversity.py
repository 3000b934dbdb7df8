"""How different the samples of one prompt are."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEU


@dataclass(frozen=True, slots=True)
class Diversity:
    """Diversity of N samples of a prompt, or the mean over prompts.

    Attributes:
        distinct_1, distinct_2, distinct_3: Different n-grams of words / all n-grams, over all samples together (Li et
            al. 2016, arXiv 1510.03055); None where no sample is that long. More is more diverse.
        self_bleu: Mean over samples of the sentence BLEU against all others, in [0, 1] (Zhu et al. 2018,
            arXiv 1802.01886); None for a single sample. Less is more diverse.
        unique: Different samples / N.
        mean_words: Mean length of a sample in words.
    """

    distinct_1: float | None
    distinct_2: float | None
    distinct_3: float | None
    self_bleu: float | None
    unique: float
    mean_words: float

    def to_json(self) -> dict[str, Any]:
        """Fields by name."""
        return asdict(self)


def measure_diversity(samples: Sequence[str]) -> Diversity:
    """Diversity of the samples of one prompt. Words are what white space separates, in lower case.

    Args:
        samples: Texts, at least one.
    """
    words = [sample.casefold().split() for sample in samples]
    texts = [" ".join(sentence) for sentence in words]
    return Diversity(
        distinct_1=distinct_n(words, 1),
        distinct_2=distinct_n(words, 2),
        distinct_3=distinct_n(words, 3),
        self_bleu=self_bleu(texts),
        unique=len(set(texts)) / len(texts),
        mean_words=fmean(map(len, words)),
    )


def mean_diversity(measured: Sequence[Diversity]) -> Diversity:
    """Mean over prompts, field by field; a prompt for which a field is None does not count in it."""

    def mean(value: Callable[[Diversity], float | None]) -> float | None:
        known = [number for item in measured if (number := value(item)) is not None]
        return fmean(known) if known else None

    return Diversity(
        distinct_1=mean(lambda item: item.distinct_1),
        distinct_2=mean(lambda item: item.distinct_2),
        distinct_3=mean(lambda item: item.distinct_3),
        self_bleu=mean(lambda item: item.self_bleu),
        unique=fmean(item.unique for item in measured),
        mean_words=fmean(item.mean_words for item in measured),
    )


def distinct_n(samples: Sequence[Sequence[str]], n: int) -> float | None:
    """Share of different n-grams among all n-grams of the samples' words; None if no sample has `n` words."""
    grams = [tuple(words[start : start + n]) for words in samples for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(samples: Sequence[str]) -> float | None:
    """Mean over samples of the sentence BLEU against all others, in [0, 1]; None for a single sample.

    BLEU of up to four words, of fewer for samples that are shorter (`effective_order`), smoothed exponentially, with
    sacrebleu's default tokenizer. A sample that occurs twice scores 1, an empty one too.
    """
    if len(samples) < 2:
        return None
    counts = Counter(samples)
    if len(counts) == 1:
        return 1.0
    # Equal samples are equal references, which count once in BLEU; so each different text is scored once.
    scores = {
        text: 1.0
        if count > 1
        else _bleu().sentence_score(text, [other for other in counts if other != text]).score / 100
        for text, count in counts.items()
    }
    return min(1.0, fmean(scores[sample] for sample in samples))  # sacrebleu's 100 may be a little more


@cache
def _bleu() -> "BLEU":
    from sacrebleu.metrics.bleu import BLEU  # of the extra `eval`

    return BLEU(effective_order=True)
