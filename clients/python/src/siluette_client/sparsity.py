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
        layers: Names of neighbouring layers that are counted together, such as "00-01", from the first to the last.
        zeros: Of each group of layers, activated gate values that were 0.
        elements: Likewise, activated gate values.
    """

    layers: tuple[str, ...]
    zeros: tuple[int, ...]
    elements: tuple[int, ...]

    @property
    def ratio(self) -> float | None:
        """Share of zeros over all layers, in [0, 1]; None if nothing ran in this mode."""
        total = sum(self.elements)
        return sum(self.zeros) / total if total else None

    @property
    def by_layers(self) -> dict[str, float | None]:
        """Share of zeros of each group of layers, in [0, 1]; None if nothing ran in this mode."""
        counts = zip(self.layers, self.zeros, self.elements, strict=True)
        return {name: zeros / total if total else None for name, zeros, total in counts}

    def since(self, earlier: "Sparsity") -> "Sparsity":
        """What came after an earlier reading of the same server.

        Raises:
            ValueError: The readings do not belong together: the server has other layers, or has started anew between.
        """
        if self.layers != earlier.layers:
            raise ValueError(f"readings of layers {earlier.layers} and {self.layers} cannot be compared")
        zeros = tuple(now - before for now, before in zip(self.zeros, earlier.zeros, strict=True))
        elements = tuple(now - before for now, before in zip(self.elements, earlier.elements, strict=True))
        if min((*zeros, *elements), default=0) < 0:
            raise ValueError("the earlier reading has higher counts: the server has started anew between the two")
        return Sparsity(self.layers, zeros, elements)


def parse_sparsity(metrics: str) -> dict[str, Sparsity]:
    """Zeros by activation mode, out of metrics in Prometheus' text format.

    Raises:
        InvalidAnswer: The text does not hold Siluette's counters.
    """
    counts: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
    try:
        for kind, labels, value in _COUNTER.findall(metrics):
            label = dict(_LABEL.findall(labels))
            counts[label["mode"]][kind, label["layers"]] = int(float(value))
        modes = {mode: _of_mode(by_layers) for mode, by_layers in counts.items()}
    except (KeyError, ValueError, OverflowError) as error:
        raise InvalidAnswer(f"the metrics' counters of zeros are not in the known form: {error!r}") from error
    if not modes:
        raise InvalidAnswer("the metrics hold no counters of zeros (siluette_ffn_zeros_total): is this Siluette?")
    return modes


def _of_mode(counts: Mapping[tuple[str, str], int]) -> Sparsity:
    layers = tuple(sorted({name for _, name in counts}))  # numbers in the names have the same number of digits
    zeros, elements = (tuple(counts[kind, name] for name in layers) for kind in ("zeros", "elements"))
    return Sparsity(layers, zeros, elements)
