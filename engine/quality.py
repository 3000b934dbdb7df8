"""What a checkpoint's metadata says about its measured quality."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

PERPLEXITY_KEY = "siluette.perplexity"
SPARSITY_KEY = "siluette.sparsity"


@dataclass(frozen=True, slots=True)
class MeasuredQuality:
    """Measurements that whoever tuned the checkpoint wrote into it; empty where there are none.

    Attributes:
        perplexity: By held-out text, then by activation ("silu", "p=0.5", "relu").
        sparsity: Share of zeros in RELU mode by layer.
    """

    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    sparsity: tuple[float, ...] = ()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "MeasuredQuality":
        """Read `siluette.perplexity` and `siluette.sparsity`, both JSON, of a safetensors header.

        Raises:
            ValueError: A key has a value that it cannot have.
        """
        perplexity = json.loads(metadata.get(PERPLEXITY_KEY, "{}"))
        sparsity = json.loads(metadata.get(SPARSITY_KEY, "[]"))
        try:
            return cls(
                {
                    str(text): {str(name): float(value) for name, value in row.items()}
                    for text, row in perplexity.items()
                },
                tuple(float(share) for share in sparsity),
            )
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"{PERPLEXITY_KEY} must map texts to activations to numbers, {SPARSITY_KEY} must be a list of numbers"
            ) from error

    def to_metadata(self) -> dict[str, str]:
        """The keys that `from_metadata` reads, with as many digits as mean something."""
        rounded = {
            text: {name: round(value, 3) for name, value in row.items()} for text, row in self.perplexity.items()
        }
        sparsity = [round(share, 4) for share in self.sparsity]
        return {PERPLEXITY_KEY: json.dumps(rounded), SPARSITY_KEY: json.dumps(sparsity)}

    @property
    def mean_sparsity(self) -> float | None:
        """Share of zeros in RELU mode over all layers; None if it was not measured."""
        return sum(self.sparsity) / len(self.sparsity) if self.sparsity else None
