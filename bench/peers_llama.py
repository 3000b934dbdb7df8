"""llama.cpp's C API without a server, one stream. Runs in llama.cpp's environment, so it imports nothing of Siluette.

`convert SOURCE TARGET TYPE` writes a GGUF file in another type. `measure MODEL` prints one line of JSON: output tokens
per second of one stream (prompt included, and while decoding), and the time to the first token of a long prompt.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

llama: Any = importlib.import_module("llama_cpp")

FIRST_PLAIN_TOKEN = 100  # lower ones may have a meaning of their own
CONTEXT = 2048


def convert(source: Path, target: Path, name: str) -> None:
    """Write a model with its matrices in another type.

    Args:
        source: GGUF file.
        target: GGUF file to write.
        name: `bf16` or `q8_0`.
    """
    settings = llama.llama_model_quantize_default_params()
    settings.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{name.upper()}")
    settings.allow_requantize = True
    if llama.llama_model_quantize(str(source).encode(), str(target).encode(), settings):
        sys.exit("llama_model_quantize failed")


class Stream:
    """One sequence at a time over llama.cpp's C API, decoded greedily."""

    def __init__(self, model: Path, threads: int) -> None:
        self._model = llama.llama_model_load_from_file(str(model).encode(), llama.llama_model_default_params())
        settings = llama.llama_context_default_params()
        settings.n_ctx = CONTEXT
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, settings)
        if not self._context:
            sys.exit("llama.cpp cannot load the model")
        self._sampler = llama.llama_sampler_init_greedy()
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def generate(self, prompt: list[int], count: int) -> Iterator[int]:
        """`count` tokens after a prompt of token ids; the end of a text does not end it."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        tokens = (llama.llama_token * len(prompt))(*prompt)
        one = (llama.llama_token * 1)()
        for _ in range(count):
            if llama.llama_decode(self._context, llama.llama_batch_get_one(tokens, len(tokens))):
                sys.exit("llama_decode failed")
            one[0] = llama.llama_sampler_sample(self._sampler, self._context, -1)
            tokens = one
            yield one[0]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one round, in the form that `bench.peers_session` reads."""
    stream = Stream(options.model, options.threads)
    rng = random.Random(options.seed)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(FIRST_PLAIN_TOKEN, stream.vocabulary) for _ in range(length)]

    for _ in stream.generate(prompt(options.prompt_tokens), 4):  # warms up
        pass
    firsts, total, decoding, produced = [], 0.0, 0.0, 0
    for _ in range(options.requests):
        start = time.perf_counter()
        times = [time.perf_counter() for _ in stream.generate(prompt(options.prompt_tokens), options.output_tokens)]
        produced += len(times)
        total += times[-1] - start
        decoding += times[-1] - times[0]
    for _ in range(options.requests):
        start = time.perf_counter()
        next(stream.generate(prompt(options.long_prompt), 1))
        firsts.append(time.perf_counter() - start)
    return {
        "loads": [
            {
                "streams": 1,
                "requests": options.requests,
                "output_tokens": produced,
                "tokens_per_second": produced / total,
                "decode_tokens_per_second": (produced - options.requests) / decoding if decoding else None,
            }
        ],
        "ttft_ms": 1000 * statistics.median(firsts),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "build": llama.llama_print_system_info().decode().strip(),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    convert_parser = commands.add_parser("convert")
    convert_parser.add_argument("source", type=Path)
    convert_parser.add_argument("target", type=Path)
    convert_parser.add_argument("type", choices=["bf16", "q8_0"])
    measure_parser = commands.add_parser("measure")
    measure_parser.add_argument("model", type=Path)
    for name in ("threads", "requests", "prompt-tokens", "output-tokens", "long-prompt", "seed"):
        measure_parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    if options.command == "convert":
        convert(options.source, options.target, options.type)
        return
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
        result = measure(options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
