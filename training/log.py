"""The log of a run: one CSV line a step, one JSON line a measurement, and a picture of both."""

import csv
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import geometric_mean
from typing import IO, Any

STEPS_FILE = "steps.csv"
MEASUREMENTS_FILE = "measurements.jsonl"
PLOT_FILE = "training.svg"
RUN_FILE = "run.json"  # settings, and what they ran on


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimiser step.

    Attributes:
        step: Counts from 1.
        tokens: Read so far.
        loss: What was minimised.
        next_token: Cross-entropy in nats.
        distillation: Divergence from the teacher in nats; nan without one.
        zeros: Share of zeros in sequences with RELU; nan if there was none.
        gradient_norm: Before clipping.
        learning_rate: Of this step.
        seconds: Wall time of this step.
    """

    step: int
    tokens: int
    loss: float
    next_token: float
    distillation: float
    zeros: float
    gradient_norm: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """Perplexity on held-out text.

    Attributes:
        step: After so many steps.
        perplexity: By text, then by activation ("silu", "p=0.5", "relu").
        zeros: Share of zeros in RELU mode by layer.
    """

    step: int
    perplexity: Mapping[str, Mapping[str, float]]
    zeros: list[float]

    def mean_perplexity(self) -> dict[str, float]:
        """By activation, the geometric mean over the texts."""
        texts = list(self.perplexity.values())
        return {activation: geometric_mean([text[activation] for text in texts]) for activation in texts[0]}


class RunLog:
    """Appends to the files of a run's folder; a run that goes on first drops what came after its saved state."""

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.steps = [record for record in read_steps(folder / STEPS_FILE) if record.step <= first_step]
        self.measurements = [item for item in _read_measurements(folder / MEASUREMENTS_FILE) if item.step <= first_step]
        with _replacing(folder / STEPS_FILE) as file:
            writer = csv.DictWriter(file, [field.name for field in fields(StepRecord)])
            writer.writeheader()
            writer.writerows(asdict(record) for record in self.steps)
        with _replacing(folder / MEASUREMENTS_FILE) as file:
            file.writelines(json.dumps(asdict(item)) + "\n" for item in self.measurements)

    def step(self, record: StepRecord) -> None:
        """Add a step."""
        self.steps.append(record)
        with (self._folder / STEPS_FILE).open("a", newline="") as file:
            csv.DictWriter(file, [field.name for field in fields(StepRecord)]).writerow(asdict(record))

    def measurement(self, item: Measurement) -> None:
        """Add a measurement."""
        self.measurements.append(item)
        with (self._folder / MEASUREMENTS_FILE).open("a") as file:
            file.write(json.dumps(asdict(item)) + "\n")

    def plot(self) -> None:
        """Draw loss, perplexity by activation and zeros against tokens."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3.6), layout="constrained")
        loss, perplexity, zeros = figure.subplots(1, 3)
        tokens = [record.tokens / 1e6 for record in self.steps]
        loss.plot(tokens, [record.loss for record in self.steps], linewidth=0.8)
        loss.set(title="loss", xlabel="million tokens", ylabel="nats per token", yscale="log")
        at = {record.step: record.tokens / 1e6 for record in self.steps} | {0: 0.0}
        measured = [item for item in self.measurements if item.step in at]
        means = [item.mean_perplexity() for item in measured]
        for activation in means[0] if means else ():
            values = [mean[activation] for mean in means]
            perplexity.plot([at[item.step] for item in measured], values, marker=".", label=activation)
        perplexity.set(title="perplexity on held-out text", xlabel="million tokens", yscale="log")
        if measured:
            perplexity.legend()
        zeros.plot(tokens, [record.zeros for record in self.steps], linewidth=0.8)
        zeros.set(title="zeros in RELU sequences", xlabel="million tokens", ylim=(0, 1))
        figure.savefig(self._folder / PLOT_FILE)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
    """A file that takes the place of `path` once it is written: a kill must not cost the log of hours."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w", newline="") as file:
        yield file
    os.replace(unfinished, path)


def read_steps(path: Path) -> list[StepRecord]:
    """Records of a run; none where there is no file."""
    if not path.is_file():
        return []
    records = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                values = {name: int(text) if name in ("step", "tokens") else float(text) for name, text in row.items()}
            except (TypeError, ValueError):
                break  # a line that a kill cut short
            records.append(StepRecord(**values))  # type: ignore[arg-type]
    return records


def _read_measurements(path: Path) -> list[Measurement]:
    if not path.is_file():
        return []
    items = []
    for line in path.read_text().splitlines():
        try:
            document: dict[str, Any] = json.loads(line)
        except ValueError:
            break  # a line that a kill cut short
        items.append(Measurement(**document))
    return items
