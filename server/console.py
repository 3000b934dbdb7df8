"""What the command line prints: samples, figures of a generation, a model's description."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from engine import Activation, ActivationMode, EngineStats, MeasuredQuality, ModelInfo, RequestOutput, SampleOutput

MIN_SAMPLE_WIDTH = 38  # narrower columns of text are hard to read


def printable(text: str) -> str:
    """Text without control characters: a model may write escape sequences, which would reach the terminal."""
    return "".join(char for char in text if char in "\n\t" or (char >= " " and not "\x7f" <= char <= "\x9f"))


def print_generation(out: Console, log: Console, pieces: Iterable[RequestOutput], n: int) -> RequestOutput:
    """Print one sample as it comes, or several when they are complete.

    Args:
        out: Takes the text.
        log: Takes a sign of progress where `out` has to wait.
        pieces: What the engine yields; at least one.
        n: Number of samples.

    Returns:
        The pieces put together.
    """
    whole: RequestOutput | None = None
    with log.status("Generating") if n > 1 and log.is_terminal else nullcontext():
        for piece in pieces:
            if n == 1:
                for sample in piece.samples:
                    out.file.write(printable(sample.text))
                out.file.flush()
            if whole is None:
                whole = piece
            else:
                whole.extend(piece)
    assert whole is not None
    if n == 1:
        out.file.write("\n")
        out.file.flush()
    else:
        print_samples(out, whole.samples)
    return whole


def print_samples(console: Console, samples: Sequence[SampleOutput]) -> None:
    """Samples side by side, as many as the terminal is wide enough for; one after another where it is no terminal."""
    ordered = sorted(samples, key=lambda sample: sample.index)
    if not console.is_terminal:
        for sample in ordered:
            console.print(Text(f"=== sample {sample.index} ({_ending(sample)}) ==="), soft_wrap=True)
            console.print(Text(printable(sample.text)), soft_wrap=True)
        return
    rows = math.ceil(len(ordered) / max(1, console.width // MIN_SAMPLE_WIDTH))
    columns = math.ceil(len(ordered) / rows)  # four samples where three fit: two rows of two
    for first in range(0, len(ordered), columns):
        row = ordered[first : first + columns]
        grid = Table.grid(expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1)
        grid.add_row(*(_panel(sample) for sample in row))
        console.print(grid)


def _panel(sample: SampleOutput) -> Panel:
    text = Text(printable(sample.text).strip())
    return Panel(text, title=f"sample {sample.index}", subtitle=_ending(sample), subtitle_align="right")


def _ending(sample: SampleOutput) -> str:
    return f"{len(sample.token_ids)} tokens, {sample.finish_reason or 'unfinished'}"


def print_footer(console: Console, output: RequestOutput, seconds: float, stats: EngineStats) -> None:
    """What was used, how fast it went, and how many feed-forward values were zero."""
    tokens = sum(len(sample.token_ids) for sample in output.samples)
    speed = f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s"
    lines = [
        f"activation {describe_activation(output.activation)}; seed {output.seed}",
        f"{output.num_prompt_tokens} prompt tokens, {speed}",
    ]
    if shares := zero_shares(stats.ffn_zeros, stats.ffn_elements):
        lines.append("zeros in the feed-forward: " + ", ".join(f"{mode} {share:.1%}" for mode, share in shares.items()))
    for line in lines:
        console.print(Text(line, style="dim"), soft_wrap=True)


def describe_activation(activation: Activation) -> str:
    """The activation in words, with everything that repeating it takes."""
    parts = [str(activation.mode)]
    if activation.mode is ActivationMode.STOCHASTIC:
        parts += [f"p {activation.p:g}", f"activation seed {activation.seed}"]
    if activation.mode is not ActivationMode.SILU:
        parts.append(f"scope {activation.scope}")
    return ", ".join(parts)


def zero_shares(
    zeros: Mapping[ActivationMode, Sequence[int]], elements: Mapping[ActivationMode, Sequence[int]]
) -> dict[ActivationMode, float]:
    """Share of zeros among the activated values over all layers, for each mode that has run."""
    totals = {mode: sum(counts) for mode, counts in elements.items()}
    return {mode: sum(zeros[mode]) / total for mode, total in totals.items() if total}


def model_table(info: ModelInfo) -> Table:
    """Model, modes, kernels and memory as `siluette info` shows them."""
    support = info.support
    tuned = "tuned" if support.tuned else "not tuned: what untuned models tolerate"
    rows = {
        "model": info.name,
        **({"adapter": info.adapter} if info.adapter else {}),
        "architecture": info.architecture,
        "parameters": f"{info.num_parameters / 1e6:,.1f} M",
        "shape": f"{info.num_layers} layers, hidden {info.hidden_size}, intermediate {info.intermediate_size}, "
        f"vocabulary {info.vocab_size}",
        "context": f"{info.max_model_len} tokens",
        "dtype": info.dtype,
        **({"quantised": info.quantization} if info.quantization != "none" else {}),
        "modes": f"{support.describe()} ({tuned})",
        "positive branch": str(support.positive_branch),
        **_quality_rows(info.quality),
        "weights": _mib(info.weight_bytes),
        "KV cache": f"{_mib(info.kv_cache_bytes)}, {info.num_kv_blocks} blocks of {info.block_size} tokens",
        "device": info.device,
        "threads": str(info.threads),
        **{f"{name} kernels": description for name, description in info.kernels.items()},
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _quality_rows(quality: MeasuredQuality) -> dict[str, str]:
    """What the checkpoint says of itself; no row where it says nothing."""
    rows = {
        f"perplexity, {text}": "  ".join(f"{name} {value:.2f}" for name, value in values.items())
        for text, values in quality.perplexity.items()
    }
    if quality.mean_sparsity is not None:
        low, high = min(quality.sparsity), max(quality.sparsity)
        rows["zeros in RELU mode"] = f"{quality.mean_sparsity:.1%} on average, {low:.0%} to {high:.0%} by layer"
    return rows


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
