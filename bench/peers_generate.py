"""`generate` of transformers without a server: static batches. Runs in transformers' environment, without Siluette.

Prints one line of JSON: output tokens per second of each batch size (prompt included, and while decoding), and the time
to the first token of one long prompt.
"""

import argparse
import importlib
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

torch: Any = importlib.import_module("torch")
transformers: Any = importlib.import_module("transformers")

FIRST_PLAIN_TOKEN = 100  # lower ones may have a meaning of their own


class Clock:
    """A stopping criterion that stops nothing and notes when each step's tokens are there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """See transformers' `StoppingCriteria`."""
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Generator:
    """A model that continues random prompts greedily."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self._random = torch.Generator().manual_seed(seed)

    def run(self, batch: int, prompt_tokens: int, output_tokens: int) -> tuple[float, list[float]]:
        """Continue `batch` prompts at once; the moment of the start, and of each step's end."""
        vocabulary = self._model.config.vocab_size
        shape = (batch, prompt_tokens)
        prompts = torch.randint(FIRST_PLAIN_TOKEN, vocabulary, shape, generator=self._random)
        clock = Clock()
        start = time.perf_counter()
        with torch.inference_mode():
            answers = self._model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=output_tokens,
                stopping_criteria=[clock],
            )
        assert answers.shape == (batch, prompt_tokens + output_tokens)
        return start, clock.times


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of one round, in the form that `bench.peers_session` reads."""
    torch.set_num_threads(options.threads)
    generator = Generator(options.model, options.seed)
    generator.run(1, options.prompt_tokens, 4)  # warms up
    loads = []
    for batch in options.streams:
        total, decoding, produced = 0.0, 0.0, 0
        batches = max(1, options.requests // batch)
        for _ in range(batches):
            start, times = generator.run(batch, options.prompt_tokens, options.output_tokens)
            produced += batch * len(times)
            total += times[-1] - start
            decoding += times[-1] - times[0]
        load = {
            "streams": batch,
            "requests": batches * batch,
            "output_tokens": produced,
            "tokens_per_second": produced / total,
            "decode_tokens_per_second": (produced - batches * batch) / decoding if decoding else None,
        }
        loads.append(load)
    firsts = []
    for _ in range(options.requests):
        start, times = generator.run(1, options.long_prompt, 1)
        firsts.append(times[0] - start)
    return {
        "loads": loads,
        "ttft_ms": 1000 * statistics.median(firsts),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", required=True)
    for name in ("threads", "requests", "prompt-tokens", "output-tokens", "long-prompt", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
