"""Options of the commands of `siluette eval`, as annotated types; see `server.cli_options`."""

from pathlib import Path
from typing import Annotated

import typer

MEASURE, OUTPUT = "Measurement", "Output"

Texts = Annotated[
    list[Path],
    typer.Argument(
        help="File, or folder of *.txt, *.md and *.jsonl files; JSONL has lines of {'text': ...} or "
        "{'messages': [...]}. Each argument is measured on its own.",
        exists=True,
        show_default=False,
    ),
]
Activations = Annotated[
    list[str] | None,
    typer.Option(
        "--activation",
        help="'silu', 'relu' or 'stochastic:P'; may be given several times.",
        show_default="perplexity: silu, stochastic with p 0.9, 0.7, 0.5, 0.3, and relu, those that the checkpoint "
        "was tuned for; sparsity: relu",
        rich_help_panel=MEASURE,
    ),
]
WindowTokens = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=2,
        help="Tokens of a window; windows do not overlap.",
        show_default="1024, or the model's context if that is shorter",
        rich_help_panel=MEASURE,
    ),
]
TextTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, help="Of each text.", show_default="all", rich_help_panel=MEASURE),
]
Passes = Annotated[
    int,
    typer.Option("--seeds", min=1, help="Passes with different draws in stochastic mode.", rich_help_panel=MEASURE),
]
EvalSeed = Annotated[int, typer.Option("--seed", help="The same seed: the same figures.", rich_help_panel=MEASURE)]
Temperatures = Annotated[
    list[float] | None,
    typer.Option(
        "--temperature",
        help="Temperature of SILU; may be given several times.",
        show_default="0.3, 0.7, 1.0, 1.5",
        rich_help_panel=MEASURE,
    ),
]
Probabilities = Annotated[
    list[float] | None,
    typer.Option(
        "-p",
        "--p",
        help="p of the stochastic activation, greedy and at temperature 0.7, in both scopes; may be given several "
        "times.",
        show_default="0.9, 0.7, 0.5, 0.3, those that the checkpoint was tuned for",
        rich_help_panel=MEASURE,
    ),
]
JsonPath = Annotated[
    Path | None,
    typer.Option(
        "--json",
        dir_okay=False,
        help="Write model, settings, machine and figures here.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
PlotPath = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        dir_okay=False,
        help="Draw a picture here, .svg or .png (needs the extra 'eval').",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
WithTexts = Annotated[
    bool, typer.Option("--with-texts", help="Write all samples into the JSON file, too.", rich_help_panel=OUTPUT)
]
