"""Pre-training from scratch at a small scale: SILU, RELU, stochastic and "switch" (arXiv 2509.22358, section 4).

    python -m training.corpus --output corpus
    python -m bench.pretraining --corpus corpus

trains a Llama-shaped model of two million weights with each recipe and seed. For a seed, all recipes start from the
same weights and read the same batches; nothing but the activation differs. A run that is finished is not done again.
"""

import argparse
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from bench.pretraining_plot import Series, plot
from bench.results import add_out_option, save, spread
from engine import PositiveBranch
from training.config import Method, Trained, TuneConfig
from training.documents import Document, read_documents
from training.errors import TextError, TrainingError
from training.log import Measurement, StepRecord
from training.schedule import Constant
from training.text import TextMixture, TokenizedText, TransformersTokenizer
from training.trainer import Text, Trainer

ROOT = Path(__file__).parents[1]
HEAD_DIM = 32
END_OF_TEXT = "<|endoftext|>"
WEIGHT_DECAY = 0.1
WARMUP_SHARE = 0.05
EVAL_TOKENS = 8192  # of each held-out text
CURVE_POINTS = 100


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to pre-train.

    Attributes:
        label: For people.
        method: Of the trainer.
        p: Probability of SILU for a negative gate value; None is the one that was asked for.
        switches: Whether the last steps run with RELU instead.
        activation: What the finished model runs with, "silu" or "relu".
    """

    label: str
    method: Method
    p: float | None
    switches: bool
    activation: str


RECIPES = {
    "silu": Recipe("SILU", Method.SWI_FT, None, switches=False, activation="silu"),
    "relu": Recipe("RELU", Method.STOCHA, 0.0, switches=False, activation="relu"),
    "stocha": Recipe("StochA", Method.STOCHA, None, switches=True, activation="relu"),
    "swi_ft": Recipe("Swi+FT", Method.SWI_FT, None, switches=True, activation="relu"),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What all runs have in common.

    Attributes:
        steps: Optimiser steps.
        batch_size: Sequences of a step.
        sequence_length: Tokens of a sequence.
        alpha: Share of the steps, at the end, that run with RELU in the recipes that switch.
        p: Of the stochastic recipe.
        learning_rate: At its peak.
        vocabulary: Entries of the tokenizer, at least 257: all bytes and the end of a text.
        hidden_size: Of the model; a multiple of 32.
        intermediate_size: Of its feed-forward blocks.
        layers: Number of layers.
        dtype: Of matrix products, "bfloat16" or "float32".
    """

    steps: int = 700
    batch_size: int = 8
    sequence_length: int = 128
    alpha: float = 0.2
    p: float = 0.7
    learning_rate: float = 2e-3
    vocabulary: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 4
    dtype: str = "bfloat16"

    @property
    def switch(self) -> int:
        """The first step after the switch to RELU."""
        return self.steps - round(self.alpha * self.steps)


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run.

    Attributes:
        seed: Of initial weights, batches and draws.
        parameters: Trained weights.
        tokens: Read.
        seconds: Of training, without measurements.
        final_loss: Mean over the held-out texts, in nats per token, with the recipe's own final activation.
        held_out_loss: The same with each activation ("silu", "p=0.5", "relu").
        held_out_loss_by_text: By text, then by activation.
        zeros: Share of zeros in RELU mode by layer, on held-out text.
        curve: Training loss as pairs (tokens, nats per token), see `thin`.
    """

    seed: int
    parameters: int
    tokens: int
    seconds: float
    final_loss: float
    held_out_loss: dict[str, float]
    held_out_loss_by_text: dict[str, dict[str, float]]
    zeros: list[float]
    curve: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Kind:
    """Plain text of one kind, to train on and to measure on."""

    name: str
    train: list[Document]
    held_out: list[Document]


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedCorpus:
    """All kinds of text, tokenized once for all runs."""

    train: list[TokenizedText]
    held_out: dict[str, TokenizedText]
    fingerprint: str

    def text(self, seed: int) -> Text:
        """What the run of a seed reads: each token of the corpus is as likely as any other."""
        return Text(TextMixture([(text, len(text)) for text in self.train], seed), self.held_out, self.fingerprint)


def read_kinds(corpus: Path) -> list[Kind]:
    """Read `KIND/train` and `KIND/held_out` of a folder.

    Kinds that are not plain text throughout are left out: chats of a corpus hold token ids of another tokenizer.

    Raises:
        TextError: No such kind, or a file that cannot be read.
    """
    kinds = []
    for folder in sorted(path.parent for path in corpus.glob("*/held_out")):
        train, held_out = (list(read_documents(folder / split)) for split in ("train", "held_out"))
        if all(isinstance(document.content, str) for document in [*train, *held_out]):
            kinds.append(Kind(folder.name, train, held_out))
    if not kinds:
        raise TextError("has no folders KIND/train and KIND/held_out of plain text", corpus)
    return kinds


def train_tokenizer(kinds: Sequence[Kind], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the text that is trained on."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((str(document.content) for kind in kinds for document in kind.train), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def write_model(tokenizer: PreTrainedTokenizerFast, settings: Settings, folder: Path) -> None:
    """Write tokenizer and configuration of a model that has no weights yet."""
    heads = settings.hidden_size // HEAD_DIM
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        max_position_embeddings=settings.sequence_length,
        # Llama's 0.02 is for thousands of dimensions: here gate values would be so small that SILU is nearly linear.
        initializer_range=settings.hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)


def tokenize(kinds: Sequence[Kind], tokenizer: PreTrainedTokenizerFast) -> TokenizedCorpus:
    """Tokenize all text."""
    adapted = TransformersTokenizer(tokenizer)
    train = [TokenizedText.from_documents(kind.name, kind.train, adapted) for kind in kinds]
    held_out = {kind.name: TokenizedText.from_documents(kind.name, kind.held_out, adapted) for kind in kinds}
    digest = hashlib.sha256(b"".join(text.token_ids.tobytes() for text in [*train, *held_out.values()]))
    return TokenizedCorpus(train, held_out, digest.hexdigest())


def run_config(recipe: Recipe, settings: Settings, seed: int, model: Path, output: Path) -> TuneConfig:
    """The trainer's settings of one run.

    The positive branch is the identity, so that RELU is max(x, 0); a sequence with p = 1 runs with plain SILU all the
    same.
    """
    return TuneConfig(
        output=output,
        model=str(model),
        method=recipe.method,
        p=Constant(settings.p if recipe.p is None else recipe.p),
        alpha=settings.alpha if recipe.switches else 0.0,
        distillation=0.0,
        positive_branch=PositiveBranch.IDENTITY,
        trained=Trained.ALL,
        learning_rate=settings.learning_rate,
        warmup_steps=round(WARMUP_SHARE * settings.steps),
        steps=settings.steps,
        batch_size=settings.batch_size,
        sequence_length=settings.sequence_length,
        weight_decay=WEIGHT_DECAY,
        seed=seed,
        dtype=settings.dtype,
        from_scratch=True,
        eval_every=0,
        eval_tokens=EVAL_TOKENS,
        save_every=settings.steps,
    )


def thin(losses: Sequence[float], switch: int, points: int = CURVE_POINTS) -> Iterator[tuple[float, float]]:
    """A curve of about `points` means, half of them before the switch and half after it, so that its spike shows.

    Yields:
        Steps done in the middle of a mean's steps, mean of their losses.
    """
    steps = np.arange(len(losses))
    for part in (steps[:switch], steps[switch:]):
        for few in np.array_split(part, min(len(part), points // 2)) if len(part) else ():
            yield float(few.mean()) + 1, float(np.mean([losses[step] for step in few]))


def report(recipe: Recipe, settings: Settings, seed: int, trainer: Trainer) -> Run:
    """What a finished run has come to."""
    steps: list[StepRecord] = trainer.log.steps
    measured: Measurement = trainer.log.measurements[-1]
    by_text = {
        text: {activation: round(math.log(value), 4) for activation, value in values.items()}
        for text, values in measured.perplexity.items()
    }
    loss = {
        activation: round(float(np.mean([losses[activation] for losses in by_text.values()])), 4)
        for activation in next(iter(by_text.values()))
    }
    step_tokens = settings.batch_size * settings.sequence_length
    return Run(
        seed=seed,
        parameters=trainer.num_trained,
        tokens=steps[-1].tokens,
        seconds=round(sum(record.seconds for record in steps), 1),
        final_loss=loss[recipe.activation],
        held_out_loss=loss,
        held_out_loss_by_text=by_text,
        zeros=[round(share, 4) for share in measured.zeros],
        curve=[
            (round(step * step_tokens), round(mean, 4))
            for step, mean in thin([record.next_token for record in steps], settings.switch)
        ],
    )


def train(settings: Settings, seeds: Sequence[int], corpus: Path, work: Path) -> dict[str, list[Run]]:
    """Do the runs that are not finished, and report all.

    Args:
        settings: Of all runs.
        seeds: Of the runs of each recipe.
        corpus: See `read_kinds`.
        work: Keeps the state of finished runs.

    Returns:
        The runs of each recipe, in the order of the seeds.

    Raises:
        TrainingError: The text cannot be used, or `work` holds runs with other settings.
    """
    print("Training the tokenizer and tokenizing the corpus", flush=True)
    kinds = read_kinds(corpus)
    tokenizer = train_tokenizer(kinds, settings.vocabulary)
    # The size is in the name, which belongs to the settings that a finished run is recognised by.
    model = work.resolve() / f"model-{settings.hidden_size}-{settings.intermediate_size}-{settings.layers}"
    write_model(tokenizer, settings, model)
    texts = tokenize(kinds, tokenizer)
    runs: dict[str, list[Run]] = {name: [] for name in RECIPES}
    for seed in seeds:
        for name, recipe in RECIPES.items():
            config = run_config(recipe, settings, seed, model, work / f"{name}-{seed}")
            trainer = Trainer(config, lambda _, seed=seed: texts.text(seed), lambda _: None)  # type: ignore[misc]
            for record in trainer.run():
                if record.step % max(1, settings.steps // 10) == 0:
                    print(f"{name}, seed {seed}: step {record.step}, loss {record.next_token:.3f}", flush=True)
            runs[name].append(report(recipe, settings, seed, trainer))
            print(f"{name}, seed {seed}: held-out loss {runs[name][-1].final_loss:.3f}", flush=True)
    return runs


def summarise(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """The runs of each recipe, with the spread over seeds of what they are compared by."""
    silu = [run.final_loss for run in runs["silu"]]
    return {
        name: {
            "activation": RECIPES[name].activation,
            "final_loss": spread([run.final_loss for run in members], digits=4),
            "final_loss_minus_silu": spread(
                [run.final_loss - base for run, base in zip(members, silu, strict=True)], digits=4
            ),
            "zeros": spread([float(np.mean(run.zeros)) for run in members], digits=4),
            "runs": [asdict(run) for run in members],
        }
        for name, members in runs.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.pretraining", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--corpus", type=Path, default=Path("corpus"), metavar="FOLDER", help="with KIND/train and KIND/held_out"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name, default in asdict(Settings()).items():
        choices = ("bfloat16", "float32") if name == "dtype" else None
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, choices=choices, help="default: %(default)s")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "pretraining", metavar="FOLDER", help="keeps finished runs"
    )
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "images" / "pretraining.svg", metavar="FILE")
    add_out_option(parser)
    options = parser.parse_args(arguments)
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    if settings.hidden_size < HEAD_DIM or settings.hidden_size % HEAD_DIM:
        parser.error(f"--hidden-size must be a multiple of {HEAD_DIM}, got {settings.hidden_size}")
    try:
        runs = train(settings, options.seeds, options.corpus, options.work)
    except TrainingError as error:
        parser.error(str(error))
    plot([_series(name, members) for name, members in runs.items()], _switch_tokens(settings), options.image)
    described = {"seeds": options.seeds, **asdict(settings), "threads": torch.get_num_threads()}
    print(f"Written to {save('pretraining', described, summarise(runs), options.out)} and {options.image}")


def _switch_tokens(settings: Settings) -> int:
    return settings.switch * settings.batch_size * settings.sequence_length


def _series(name: str, runs: Sequence[Run]) -> Series:
    return Series(
        label=RECIPES[name].label,
        tokens=[tokens for tokens, _ in runs[0].curve],
        losses=[[loss for _, loss in run.curve] for run in runs],
        final=[run.final_loss for run in runs],
    )


if __name__ == "__main__":
    main()
