"""Compiles the kernels of whole steps for a GPU that is not there, see `compiler`: which, and how often anew.

To be run as `python -m tests.engine.kernels.triton.step_compiler CAPABILITY DTYPE FOLDER`; FOLDER is for a tiny model.
The backend and the sampler run as they do in the engine, on tensors in CPU memory, and launch nothing.
"""

import json
import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from engine.activation import Activation
from engine.kernels.triton.backend import StepLimits, TritonBackend
from engine.kernels.triton.sampler import TritonSampler, score_tokens
from engine.kv_cache import KVCache
from engine.models import load_checkpoint
from engine.sampler import SamplingRow, UnusableLogits
from engine.sampling_params import SamplingParams
from tests.engine.kernels.triton.compiler import MULTIPLY, AbsentDevice
from tests.engine.models.tiny import make_tiny
from tests.engine.steps import Chunk, step_inputs

CONTEXT = 2048  # several splits, so that few rows share them among programs
RELU = Activation("relu")


class Compiled:
    """Every kernel that was compiled: name -> compile-time constants -> machine code."""

    def __init__(self) -> None:
        self.kernels: dict[str, dict[int, Any]] = defaultdict(dict)
        launch = JITFunction.run

        def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            kernel = launch(function, *args, grid=grid, warmup=True, **options)
            self.kernels[function.__name__][id(kernel)] = kernel
            return kernel

        JITFunction.run = compile_only

    def counts(self) -> dict[str, int]:
        return {name: len(kernels) for name, kernels in sorted(self.kernels.items())}

    def instructions(self) -> dict[str, list[list[str]]]:
        """Matrix instructions of each compiled kernel that has any."""
        found = {
            name: [sorted(set(MULTIPLY.findall(kernel.asm["ptx"]))) for kernel in kernels.values()]
            for name, kernels in self.kernels.items()
        }
        return {name: each for name, each in found.items() if any(each)}


def chunks(rows: int, *, decoding: bool) -> list[Chunk]:
    """So many rows: a sequence each, or a prompt and a decoding row."""
    if decoding:
        return [Chunk([7], 20, [line, line + 1], RELU) for line in range(rows)]
    return [Chunk([7] * (rows - 1), 0, [*range(-(-rows // 16))], RELU), Chunk([9], 5, [20], Activation())]


def main(capability: int, dtype: torch.dtype, folder: Path) -> None:
    driver.set_active(AbsentDevice(capability))
    compiled = Compiled()
    make_tiny("qwen3", folder, num_hidden_layers=1, max_position_embeddings=CONTEXT, intermediate_size=192)
    checkpoint = load_checkpoint(str(folder), dtype=dtype, progress=lambda line: None)
    cache = KVCache.allocate(checkpoint.config, 128, dtype)
    limits = StepLimits(rows=192, sequences=16, tokens=CONTEXT)
    decoder = TritonBackend(checkpoint.config, checkpoint.weights, cache, limits=limits)
    sampler = TritonSampler()

    def run(rows: int, *, decoding: bool, sparse: bool) -> None:
        hidden = decoder.forward(step_inputs(chunks(rows, decoding=decoding), sparse=sparse))
        logits = decoder.logits(hidden[:3].clone())
        row = SamplingRow(SamplingParams(top_k=3, top_p=0.9, seed=0), (1, 2), 9, (1,), ())
        with suppress(UnusableLogits):  # nothing was computed
            sampler.sample(logits, [row] * len(logits))
        score_tokens(logits, torch.zeros(len(logits), dtype=torch.int64))

    def run_all(sizes: tuple[int, ...], prompts: tuple[int, ...]) -> None:
        for sparse in (False, True):
            for rows in sizes:
                run(rows, decoding=True, sparse=sparse)
            for rows in prompts:
                run(rows, decoding=False, sparse=sparse)

    with torch.inference_mode():
        run_all((1, 2, 4, 8, 16), (20, 40, 150))  # powers of two up to a tile, and more
        first = compiled.counts()
        run_all((3, 5), (2, 33, 64, 65, 191))
    print(json.dumps({"first": first, "later": compiled.counts(), "instructions": compiled.instructions()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), Path(sys.argv[3]))
