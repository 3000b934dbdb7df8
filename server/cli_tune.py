"""`siluette tune`: train stochastic activations or a switch to RELU into a checkpoint.

Whatever loads torch is imported inside the command, as in `server.cli`.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from server import cli_options as opt
from server.cli_support import errors_as_one_line, progress_on

if TYPE_CHECKING:
    from training.config import TuneConfig
    from training.log import Measurement
    from training.trainer import Trainer

SWI_FT_ALPHA = 0.1  # in the paper 5 to 20 % of the steps
SELF_GENERATED_FILE = "self-generated.jsonl"
ACTIVATIONS, LOSS, OPTIMISER, RUN = "Activations", "Loss", "Optimiser", "Run"


def tune(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", file_okay=False, help="Folder for the result; a killed run in it goes on."),
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            "-t",
            help="File, folder or JSONL to train on, with a weight if wanted: 'docs:0.5'; may be given several times.",
        ),
    ] = None,
    self_generated: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Train on so many texts, too, that the model writes itself first: conversations if it has a chat "
            "template, else documents.",
        ),
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(exists=True, help="Text that perplexity is measured on; may be given several times."),
    ] = None,
    model: opt.ModelOption = None,
    method: Annotated[
        Literal["stocha", "swi+ft"],
        typer.Option(
            help="stocha trains with the stochastic activation, swi+ft with SILU.", rich_help_panel=ACTIVATIONS
        ),
    ] = "stocha",
    p: Annotated[
        str,
        typer.Option(
            "-p",
            "--p",
            help="p of stocha: a number, 'START:END', or shares of sequences: 'relu=0.5,silu=0.25,uniform=0.25'.",
            rich_help_panel=ACTIVATIONS,
        ),
    ] = "relu=0.45,silu=0.3,uniform=0.25",
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Share of the steps, at the end, in RELU mode.",
            show_default="0; 0.1 with swi+ft",
            rich_help_panel=ACTIVATIONS,
        ),
    ] = None,
    positive_branch: Annotated[
        Literal["silu", "identity"],
        typer.Option(help="What is computed for gate values >= 0.", rich_help_panel=ACTIVATIONS),
    ] = "silu",
    distillation: Annotated[
        float | None,
        typer.Option(
            help="Weight of the divergence from the untouched model; the next token's loss has the rest.",
            show_default="1; 0 from scratch",
            rich_help_panel=LOSS,
        ),
    ] = None,
    gate_l1: Annotated[
        float, typer.Option(help="Weight of the L1 norm of act(gate): more zeros.", rich_help_panel=LOSS)
    ] = 0.0,
    train: Annotated[
        Literal["lora", "ffn", "all"],
        typer.Option(
            help="Low-rank changes of the feed-forward matrices, these matrices, or all weights.",
            rich_help_panel=OPTIMISER,
        ),
    ] = "lora",
    adapter: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="LoRA adapter to go on from; its rank and scale count.",
            rich_help_panel=OPTIMISER,
        ),
    ] = None,
    lora_rank: Annotated[int, typer.Option(help="Rank of the changes.", rich_help_panel=OPTIMISER)] = 64,
    lora_alpha: Annotated[
        float | None,
        typer.Option(
            help="Changes are scaled by this over the rank.", show_default="the rank", rich_help_panel=OPTIMISER
        ),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="At its peak.", rich_help_panel=OPTIMISER)
    ] = 1e-3,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear warm-up.", rich_help_panel=OPTIMISER)] = 10,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.", rich_help_panel=OPTIMISER)] = 0.0,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", rich_help_panel=RUN)] = 1000,
    batch_size: Annotated[int, typer.Option(help="Sequences of a step.", rich_help_panel=RUN)] = 8,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(help="Sequences in the model at once.", show_default="all", rich_help_panel=RUN),
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.", rich_help_panel=RUN)] = 256,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory, a third more time.", rich_help_panel=RUN),
    ] = False,
    from_scratch: Annotated[
        bool,
        typer.Option("--from-scratch", help="Start from random weights of the model's shape.", rich_help_panel=RUN),
    ] = False,
    eval_every: Annotated[
        int, typer.Option(help="Steps between measurements; 0: at start and end.", rich_help_panel=RUN)
    ] = 100,
    eval_tokens: Annotated[int, typer.Option(help="Tokens of each held-out text.", rich_help_panel=RUN)] = 2048,
    save_every: Annotated[
        int, typer.Option(help="Steps between saves of the state to go on from.", rich_help_panel=RUN)
    ] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of text, draws and initial weights.", rich_help_panel=RUN)] = 0,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Type of products.", rich_help_panel=RUN)
    ] = "bfloat16",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to train.", rich_help_panel=RUN)] = "cpu",
    threads: opt.Threads = None,
) -> None:
    """Make a model good in stochastic and RELU mode; the result is an adapter or a checkpoint for `siluette serve`."""
    if find_spec("peft") is None or find_spec("matplotlib") is None:
        raise typer.BadParameter("training needs more packages: pip install 'siluette[train]'", param_hint="tune")
    from engine import EngineError, PositiveBranch, use_threads
    from training.config import Method, Trained, TuneConfig
    from training.errors import TrainingError
    from training.schedule import parse_p
    from training.text import TextSource
    from training.trainer import Trainer
    from training.tune import finish, names_of, text_reader

    console, log = Console(), Console(stderr=True)
    with errors_as_one_line(TrainingError, EngineError, OSError):
        config = TuneConfig(
            output=output,
            model=model,
            method=Method(method),
            p=parse_p(p),
            alpha=(SWI_FT_ALPHA if method == "swi+ft" else 0.0) if alpha is None else alpha,
            distillation=(0.0 if from_scratch else 1.0) if distillation is None else distillation,
            gate_l1=gate_l1,
            positive_branch=PositiveBranch(positive_branch),
            trained=Trained(train),
            adapter=adapter,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            steps=steps,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            gradient_checkpointing=gradient_checkpointing,
            from_scratch=from_scratch,
            eval_every=eval_every,
            eval_tokens=eval_tokens,
            save_every=save_every,
            seed=seed,
            dtype=dtype,
            device=device,
        )
        sources = [TextSource.parse(item) for item in text or []]
        if self_generated is not None:
            sources.append(TextSource(_write_own_text(config, self_generated, threads, progress_on(log))))
        use_threads(threads)
        reader = text_reader(sources, names_of(held_out or []), seed)
        trainer = Trainer(config, reader, progress_on(log))
        log.print(f"Training {trainer.num_trained / 1e6:.1f} million weights", style="dim")
        _run(trainer, log)
        path = finish(trainer)
        if trainer.log.measurements:
            console.print(_quality_table(trainer.log.measurements[0], trainer.log.measurements[-1]))
        log.print(f"Wrote {path}", style="dim", soft_wrap=True)


def _write_own_text(config: "TuneConfig", count: int, threads: int | None, progress: Callable[[str], None]) -> Path:
    from engine import LLM
    from training.self_generation import fast_config, write_texts

    path = config.output / SELF_GENERATED_FILE
    with LLM(config=fast_config(config.model, threads, config.device), progress=progress) as llm:
        chats = llm.tokenizer.has_chat_template
        write_texts(llm, path, count, config.seed, chats=chats, report=progress)
    return path


def _run(trainer: "Trainer", log: Console) -> None:
    bar = Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=log,
    )
    with bar:
        task = bar.add_task("starting", total=trainer.config.steps, completed=trainer.step)
        for record in trainer.run():
            zeros = "" if math.isnan(record.zeros) else f"  zeros {record.zeros:.0%}"
            measured = _in_short(trainer.log.measurements[-1]) if trainer.log.measurements else ""
            bar.update(task, completed=record.step, description=f"loss {record.loss:.3f}{zeros}{measured}")


def _in_short(measurement: "Measurement") -> str:
    """Perplexity of each activation, the geometric mean over the texts."""
    means = measurement.mean_perplexity()
    return "  perplexity " + " ".join(f"{name} {value:.1f}" for name, value in means.items())


def _quality_table(before: "Measurement", after: "Measurement") -> Table:
    table = Table(title=f"Perplexity on held-out text, before → after; zeros {sum(after.zeros) / len(after.zeros):.1%}")
    activations = list(next(iter(after.perplexity.values())))
    table.add_column("text")
    for name in activations:
        table.add_column(name, justify="right")
    for text, values in after.perplexity.items():
        first = before.perplexity.get(text, values)  # a text that was added when the run went on has no "before"
        table.add_row(text, *(f"{first[name]:.2f} → {values[name]:.2f}" for name in activations))
    return table
