"""A run from its text to its result: what `siluette tune` does."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.device import device_name
from training.config import TuneConfig
from training.errors import TextError
from training.export import export
from training.log import RUN_FILE, Measurement
from training.text import TextMixture, TextSource, TokenizedText, TransformersTokenizer
from training.trainer import Text, Trainer

HELD_OUT_FOLDER = "held_out"


def text_reader(sources: Sequence[TextSource], held_out: Mapping[str, Path], seed: int) -> Callable[[Any], Text]:
    """What reads and tokenizes a run's text once its tokenizer is there.

    Args:
        sources: Text to train on.
        held_out: Text to measure on, by the name it is reported under.
        seed: Of the batches.

    Returns:
        A function of transformers' tokenizer; it raises `TextError`.
    """

    def read(tokenizer: Any) -> Text:
        adapted = TransformersTokenizer(tokenizer)
        texts = [(TokenizedText.from_path(source.path, adapted), source.weight) for source in sources]
        digest = hashlib.sha256()
        for text, weight in texts:
            digest.update(repr((len(text), weight)).encode())
            digest.update(text.token_ids.tobytes())
        measured = {name: TokenizedText.from_path(path, adapted) for name, path in held_out.items()}
        for name, text in measured.items():
            if len(text) < 2:
                raise TextError("holds no text to measure on", held_out[name])
        return Text(TextMixture(texts, seed), measured, digest.hexdigest())

    return read


def names_of(paths: Sequence[Path]) -> dict[str, Path]:
    """A name for each held-out text: its file's or folder's, or its parent's where that says more.

    Raises:
        TextError: Two texts have one name.
    """
    named: dict[str, Path] = {}
    for path in paths:
        resolved = path.resolve()
        name = resolved.parent.name if resolved.name == HELD_OUT_FOLDER else resolved.stem
        if name in named:
            raise TextError(f"two held-out texts are called '{name}': {named[name]} and {path}")
        named[name] = path
    return named


def finish(trainer: Trainer) -> Path:
    """Write a finished run's result, plot and settings into its folder.

    Returns:
        The weights' file.
    """
    quality: Measurement | None = trainer.log.measurements[-1] if trainer.log.measurements else None
    path = export(trainer.loaded, trainer.config, quality, trainer.config.output)
    trainer.log.plot()
    _write_settings(trainer.config)
    return path


def _write_settings(config: TuneConfig) -> None:
    settings = config.to_json()
    del settings["output"]
    run = {"device": device_name(torch.device(config.device)), "torch": torch.__version__, "settings": settings}
    (config.output / RUN_FILE).write_text(json.dumps(run, indent=2, default=str) + "\n")
