"""Writes the model card of an adapter from what its recipe left: corpus, run and measurements.

python -m training.model_card --build build/model --output models/smollm2-135m-stocha
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from training.log import RUN_FILE, STEPS_FILE, StepRecord, read_steps

CARD_FILE = "README.md"
TEMPLATE = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: peft
pipeline_tag: text-generation
language: en
---
# {name}

A LoRA adapter for SmolLM2-135M-Instruct with which all three activation modes of Siluette write sensible text: SILU as
before, stochastic with any p in [0, 1], and RELU, whose zeros the sparse kernels skip. The method is that of
[Stochastic activations](https://arxiv.org/abs/2509.22358): while training, a random part of the negative gate values
goes through RELU. The server merges the adapter into the default model unless it is started with `--adapter none`.

## Quality

Perplexity on held-out text, in brackets in units of SILU with this adapter (for SILU: of the untouched model), measured
by Siluette's own engine in float32 with `siluette eval perplexity`:

{quality}

Zeros in RELU mode: {zeros_mean} on average, from {zeros_low} to {zeros_high} by layer.

![Perplexity against p](perplexity.svg)
![Zeros by layer](sparsity.svg)

## Training

{steps:,} steps, {tokens} million tokens, {duration} on {machine}. The loss is the Kullback-Leibler divergence
from the untouched model; each sequence runs in RELU, in SILU or with a p of its own, and a light L1 pressure on
act(gate) makes more gate values negative. `recipe.sh` in this folder has every setting; `make model` runs it. A rerun
on other hardware gives other bits: the conversations are sampled, and sums are ordered by the number of threads.

![Loss, perplexity and zeros while training](training.svg)

## Data

| source | kind | licence |
|---|---|---|
{sources}
| conversations that the model wrote itself ([Magpie](https://arxiv.org/abs/2406.08464)) | chat | Apache-2.0 |

{amounts}

Held-out documents are named in `training/corpus.py`; training paragraphs that share 13 words in a row with any of them
were removed ({removed} of them), and the build fails if any remain.

## Limits

- {tokens} million tokens are few: the paper trains on billions. The gap between RELU and SILU is what that leaves.
- English only; the base model's errors, biases and small knowledge are unchanged.
- Measured at contexts of 512 tokens; sequences of training have {sequence_length}.
"""


def write_card(build: Path, output: Path) -> Path:
    """Write the card.

    Args:
        build: The recipe's folder: `corpus/corpus.json`, `run/`, `untouched.json`, `perplexity.json`, `sparsity.json`.
        output: The adapter's folder; its name is the adapter's.

    Returns:
        The card's file.
    """
    corpus = _read(build / "corpus" / "corpus.json")
    tuned, untouched, sparsity = (_read(build / f"{name}.json") for name in ("perplexity", "untouched", "sparsity"))
    steps, run = read_steps(build / "run" / STEPS_FILE), _read(build / "run" / RUN_FILE)
    zeros = _mean_by_layer([result["zeros"] for result in sparsity["results"]])
    card = TEMPLATE.format(
        name=output.resolve().name,
        quality=_quality_table(tuned["results"], untouched["results"]),
        zeros_mean=f"{sum(zeros) / len(zeros):.1%}",
        zeros_low=f"{min(zeros):.0%}",
        zeros_high=f"{max(zeros):.0%}",
        steps=len(steps),
        tokens=f"{steps[-1].tokens / 1e6:.1f}",
        duration=_duration(steps),
        machine=_machine(tuned["machine"]) if run["device"] == "cpu" else f"one {run['device']}",
        sources="\n".join(
            f"| {source['title']} (Debian package {source['package']} {source['version']}) | {source['kind']} | "
            f"{source['licence']} |"
            for source in corpus["sources"]
        ),
        amounts=_amounts(corpus["kinds"]),
        removed=sum(kind["removed"] for kind in corpus["kinds"].values()),
        sequence_length=run["settings"]["sequence_length"],
    )
    path = output / CARD_FILE
    path.write_text(card, encoding="utf-8")
    return path


def _quality_table(tuned: Sequence[Mapping[str, Any]], untouched: Sequence[Mapping[str, Any]]) -> str:
    activations = list(dict.fromkeys(result["activation"] for result in tuned))
    before = {result["text"]: result["perplexity"] for result in untouched if result["mode"] == "silu"}
    by_text: dict[str, dict[str, float]] = {}
    for result in tuned:
        by_text.setdefault(result["text"], {})[result["activation"]] = result["perplexity"]
    lines = [
        f"| text | untouched SILU | {' | '.join(activations)} |",
        f"|---|{'---:|' * (len(activations) + 1)}",
    ]
    for text, values in by_text.items():
        silu = values["silu"]
        cells = [
            f"{value:.2f} ({value / (before[text] if name == 'silu' else silu):.3f})" for name, value in values.items()
        ]
        lines.append(f"| {text} | {before[text]:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _amounts(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| kind | characters to train on | held out |", "|---|---:|---:|"]
    lines += [
        f"| {name} | {kind['train_characters']:,} | {kind['held_out_characters']:,} |" for name, kind in kinds.items()
    ]
    return "\n".join(lines)


def _mean_by_layer(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _duration(steps: Sequence[StepRecord]) -> str:
    seconds = sum(record.seconds for record in steps)
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"


def _machine(machine: Mapping[str, Any]) -> str:
    return f"{machine['cores']} cores of {machine['cpu']}"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main(
    build: Annotated[Path, typer.Option(help="The recipe's folder.")],
    output: Annotated[Path, typer.Option(help="The adapter's folder.")],
) -> None:
    """Write an adapter's model card."""
    typer.echo(f"wrote {write_card(build, output)}")


if __name__ == "__main__":
    typer.run(main)
