"""Plot how diverse the samples of a running server are, against p; beside it SILU against temperature.

python plot_diversity.py -o diversity.svg        (pip install siluette-client matplotlib)

Diversity is distinct-2: different pairs of neighbouring words / all pairs, over the samples of one prompt (Li et al.
2016, arXiv 1510.03055), averaged over prompts. Stochastic samples are greedy (temperature 0), so that all of their
diversity comes from the activation; SILU's comes from the temperature alone.
"""

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib as mpl

from siluette_client import Activation, AsyncClient

PROMPTS = ("Once upon a time there was", "The best thing about the moon is", "My grandmother always said that")
PROBABILITIES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
TEMPERATURES = (0.0, 0.3, 0.6, 0.9, 1.2, 1.5)


def distinct_n(samples: Sequence[str], n: int) -> float:
    """Different n-grams of words / all n-grams, over all samples; 0 if no sample has `n` words."""
    sentences = [sample.casefold().split() for sample in samples]
    grams = [tuple(words[start : start + n]) for words in sentences for start in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


async def measure(
    client: AsyncClient, options: argparse.Namespace, activation: Activation, temperature: float
) -> float:
    """Mean distinct-2 over the prompts."""
    answers = [
        await client.generate(
            prompt,
            activation=activation,
            temperature=temperature,
            n=options.samples,
            max_tokens=options.max_tokens,
            seed=options.seed,
        )
        for prompt in options.prompt
    ]
    return fmean(distinct_n(answer.texts, 2) for answer in answers)


async def measure_all(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Both curves: the values of the control, and diversity at each."""
    async with AsyncClient(options.base_url) as client:
        stochastic = [
            await measure(client, options, Activation.stochastic(p, scope="decode"), temperature=0) for p in options.p
        ]
        silu = [await measure(client, options, Activation.silu(), temperature) for temperature in options.temperature]
    return {
        "stochastic": {"p": options.p, "distinct_2": stochastic},
        "silu": {"temperature": options.temperature, "distinct_2": silu},
    }


def plot(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Two panels with one vertical axis."""
    mpl.use("Agg")  # files only; a server has no screen
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    left.plot(curves["stochastic"]["p"], curves["stochastic"]["distinct_2"], marker="o")
    left.set(title="stochastic, temperature 0", xlabel="p", ylabel="distinct-2 (higher: more diverse)")
    left.invert_xaxis()  # p = 1 is SILU: diversity grows to the right in both panels
    right.plot(curves["silu"]["temperature"], curves["silu"]["distinct_2"], marker="o", color="tab:orange")
    right.set(title="silu", xlabel="temperature")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("diversity.svg"), help="picture (svg, png, pdf)")
    parser.add_argument("--base-url", help="address of the server; by default SILUETTE_BASE_URL, else port 8000 here")
    parser.add_argument("--prompt", action="append", help="may be repeated; by default three beginnings of texts")
    parser.add_argument("-p", type=float, action="append", help="value of p; may be repeated")
    parser.add_argument("--temperature", type=float, action="append", help="temperature of silu; may be repeated")
    parser.add_argument("--samples", type=int, default=8, help="samples of each prompt (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=32, help="length of a sample (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (default: 0)")
    options = parser.parse_args(arguments)
    # Not argparse's defaults: to those, given values would be appended.
    options.prompt = options.prompt or list(PROMPTS)
    options.p = options.p or list(PROBABILITIES)
    options.temperature = options.temperature or list(TEMPERATURES)
    return options


def main() -> None:
    """Measure, plot, and print the numbers as JSON."""
    options = parse()
    curves = asyncio.run(measure_all(options))
    plot(curves, options.output)
    print(json.dumps(curves, indent=2))


if __name__ == "__main__":
    main()
