"""Zeros in the feed-forward layers, as the server counts them for all its requests (`/metrics`)."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from siluette_client.errors import InvalidAnswer

_COUNTER = re.compile(r"^siluette_ffn_(zeros|elements)_total\{([^}]*)\} (\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Sparsity:
    """Zeros of one activation mode since the server's start, or between two moments (`since`).

    Attributes:
        zeros: By layer, activated gate values that were 0.
        elements: By layer, activated gate values.
    """

    zeros: tuple[int, ...]
    elements: tuple[int, ...]

    @property
    def ratio(self) -> float | None:
        """Share of zeros over all layers, in [0, 1]; None if nothing ran in this mode."""
        total = sum(self.elements)
        return sum(self.zeros) / total if total else None

    @property
    def by_layer(self) -> list[float | None]:
        """Share of zeros of each layer, in [0, 1]."""
        return [zeros / total if total else None for zeros, total in zip(self.zeros, self.elements, strict=True)]

    def since(self, earlier: "Sparsity") -> "Sparsity":
        """What came after an earlier reading of the same server.

        Raises:
            ValueError: The readings do not belong together: the server has other layers, or has started anew between.
        """
        if len(self.zeros) != len(earlier.zeros):
            raise ValueError(f"readings of {len(earlier.zeros)} and {len(self.zeros)} layers cannot be compared")
        zeros = tuple(now - before for now, before in zip(self.zeros, earlier.zeros, strict=True))
        elements = tuple(now - before for now, before in zip(self.elements, earlier.elements, strict=True))
        if min((*zeros, *elements), default=0) < 0:
            raise ValueError("the earlier reading has higher counts: the server has started anew between the two")
        return Sparsity(zeros, elements)


def parse_sparsity(metrics: str) -> dict[str, Sparsity]:
    """Zeros by activation mode, out of metrics in Prometheus' text format.

    Raises:
        InvalidAnswer: The text does not hold Siluette's counters.
    """
    counts: dict[str, dict[tuple[str, int], int]] = defaultdict(dict)
    try:
        for kind, labels, value in _COUNTER.findall(metrics):
            label = dict(_LABEL.findall(labels))
            counts[label["mode"]][kind, int(label["layer"])] = int(float(value))
        modes = {mode: _of_mode(by_layer) for mode, by_layer in counts.items()}
    except (KeyError, ValueError, OverflowError) as error:
        raise InvalidAnswer(f"the metrics' counters of zeros are not in the known form: {error!r}") from error
    if not modes:
        raise InvalidAnswer("the metrics hold no counters of zeros (siluette_ffn_zeros_total): is this Siluette?")
    return modes


def _of_mode(counts: Mapping[tuple[str, int], int]) -> Sparsity:
    layers = range(1 + max(layer for _, layer in counts))
    return Sparsity(
        tuple(counts["zeros", layer] for layer in layers), tuple(counts["elements", layer] for layer in layers)
    )
