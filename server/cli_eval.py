"""`siluette eval`: what the activations of a checkpoint are worth.

Whatever loads torch is imported inside the commands, as in `server.cli`.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from server import cli_eval_options as ev
from server import cli_options as opt
from server.cli_support import check_writable, engine_config, errors_as_one_line, progress_on, write_json
from server.machine import describe_machine

if TYPE_CHECKING:
    from engine import LLM, Activation
    from evaluation.answers import PromptBuilder
    from evaluation.controls import Control
    from evaluation.perplexity import PerplexityResult
    from evaluation.questions import Question
    from evaluation.texts import TextWindows

NUM_EXAMPLES = 3  # solved questions before each question, for a model without a chat template

app = typer.Typer(
    help="Measure quality and diversity of a checkpoint's activations.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def perplexity(
    context: typer.Context,
    texts: ev.Texts,
    activations: ev.Activations = None,
    window: ev.WindowTokens = None,
    text_tokens: ev.TextTokens = None,
    seeds: ev.Passes = 1,
    seed: ev.EvalSeed = 0,
    json_path: ev.JsonPath = None,
    plot_path: ev.PlotPath = None,
    model: opt.ModelOption = None,
    adapter: opt.Adapter = None,
    dtype: opt.DTypeOption = None,
    quantize: opt.Quantize = None,
    device: opt.Device = None,
    kv_cache_mib: opt.KvCacheMib = None,
    kernels: opt.KernelsOption = None,
    allow_untuned_activations: opt.AllowUntuned = None,
    threads: opt.Threads = None,
) -> None:
    """Perplexity of texts, by activation."""
    from evaluation.grid import silu_share
    from evaluation.plots import plot_perplexity
    from server.console_eval import perplexity_table

    with _evaluation(context, json_path, plot_path) as llm:
        measured = _windows(llm, texts, window, text_tokens)
        results = perplexity_of(llm, measured, _grid(llm, activations), seeds=seeds, seed=seed)
        Console().print(perplexity_table(results))
        settings = {"context": window, "max_tokens": text_tokens, "seeds": seeds, "seed": seed}
        _write(json_path, "perplexity", llm, settings, [result.to_json() for result in results])
        if plot_path is not None:
            curves: dict[str, dict[float, float]] = {}
            for result in results:
                curves.setdefault(result.text, {})[silu_share(result.activation)] = result.perplexity
            plot_perplexity(curves, plot_path)


@app.command()
def sparsity(
    context: typer.Context,
    texts: ev.Texts,
    activations: ev.Activations = None,
    window: ev.WindowTokens = None,
    text_tokens: ev.TextTokens = None,
    seed: ev.EvalSeed = 0,
    json_path: ev.JsonPath = None,
    plot_path: ev.PlotPath = None,
    model: opt.ModelOption = None,
    adapter: opt.Adapter = None,
    dtype: opt.DTypeOption = None,
    quantize: opt.Quantize = None,
    device: opt.Device = None,
    kv_cache_mib: opt.KvCacheMib = None,
    kernels: opt.KernelsOption = None,
    allow_untuned_activations: opt.AllowUntuned = None,
    threads: opt.Threads = None,
) -> None:
    """Zeros of the feed-forward layers, layer by layer."""
    from evaluation.plots import plot_zeros
    from evaluation.sparsity import measure_sparsity
    from server.console_eval import sparsity_table

    with _evaluation(context, json_path, plot_path) as llm:
        grid = _grid(llm, activations or ["relu"])
        results = []
        for text in _windows(llm, texts, window, text_tokens):
            for activation in grid:
                with _bar(f"{text.name}, {_name(activation)}") as advance:
                    results.append(measure_sparsity(llm, text, activation, seed=seed, progress=advance))
        Console().print(sparsity_table(results))
        settings = {"context": window, "max_tokens": text_tokens, "seed": seed}
        _write(json_path, "sparsity", llm, settings, [result.to_json() for result in results])
        if plot_path is not None:
            plot_zeros({f"{result.text}, {_name(result.activation)}": result.zeros for result in results}, plot_path)


@app.command()
def questions(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            help="JSONL file of {'question': ..., 'answers': [...]}, or the data folder of quiz(6).",
            exists=True,
            show_default=False,
        ),
    ],
    samples: Annotated[
        int, typer.Option(min=1, max=128, help="Answers to each question.", rich_help_panel=ev.MEASURE)
    ] = 32,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Ask so many of the questions, drawn with --seed.",
            show_default="all",
            rich_help_panel=ev.MEASURE,
        ),
    ] = None,
    temperatures: ev.Temperatures = None,
    probabilities: ev.Probabilities = None,
    seed: ev.EvalSeed = 0,
    json_path: ev.JsonPath = None,
    plot_path: ev.PlotPath = None,
    with_texts: ev.WithTexts = False,
    model: opt.ModelOption = None,
    adapter: opt.Adapter = None,
    dtype: opt.DTypeOption = None,
    quantize: opt.Quantize = None,
    device: opt.Device = None,
    max_num_seqs: opt.MaxNumSeqs = None,
    kv_cache_mib: opt.KvCacheMib = None,
    kernels: opt.KernelsOption = None,
    allow_untuned_activations: opt.AllowUntuned = None,
    threads: opt.Threads = None,
) -> None:
    """Best-of-N accuracy on open questions, and diversity of the same samples."""
    from evaluation.best_of_n import ControlResult, evaluate_controls
    from evaluation.plots import plot_quality_diversity
    from evaluation.questions import load_questions
    from evaluation.quiz import read_quiz
    from server.console_eval import questions_table

    with _evaluation(context, json_path, plot_path) as llm:
        asked = read_quiz(source) if source.is_dir() else load_questions(source)
        prompt, asked = _prompt_for(llm, asked)
        if limit is not None and limit < len(asked):
            asked = random.Random(seed).sample(asked, limit)
        compared = _controls(llm, temperatures, probabilities)
        settings = {
            "questions": len(asked),
            "samples": samples,
            "limit": limit,
            "seed": seed,
            "controls": len(compared),
        }
        results: list[ControlResult] = []

        def keep(result: ControlResult) -> None:  # what took minutes is not lost with what comes after it
            results.append(result)
            _write(json_path, "questions", llm, settings, [result.to_json(with_texts) for result in results])

        with _bars() as advance:
            evaluate_controls(llm, asked, compared, samples, prompt=prompt, seed=seed, progress=advance, finished=keep)
        Console().print(questions_table(results))
        if plot_path is not None:
            plot_quality_diversity(results, plot_path)


@app.command()
def diversity(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS", help="File with one prompt a line.", exists=True, dir_okay=False, show_default=False
        ),
    ],
    samples: Annotated[
        int, typer.Option(min=1, max=128, help="Texts for each prompt.", rich_help_panel=ev.MEASURE)
    ] = 16,
    text_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="At most this many tokens a text.", rich_help_panel=ev.MEASURE)
    ] = 64,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Send each prompt as a user's message, or continue it as it is.",
            show_default="chat if the model has a chat template",
            rich_help_panel=ev.MEASURE,
        ),
    ] = None,
    temperatures: ev.Temperatures = None,
    probabilities: ev.Probabilities = None,
    seed: ev.EvalSeed = 0,
    json_path: ev.JsonPath = None,
    with_texts: ev.WithTexts = False,
    model: opt.ModelOption = None,
    adapter: opt.Adapter = None,
    dtype: opt.DTypeOption = None,
    quantize: opt.Quantize = None,
    device: opt.Device = None,
    max_num_seqs: opt.MaxNumSeqs = None,
    kv_cache_mib: opt.KvCacheMib = None,
    kernels: opt.KernelsOption = None,
    allow_untuned_activations: opt.AllowUntuned = None,
    threads: opt.Threads = None,
) -> None:
    """Diversity of texts to any prompts, and how far they go from the greedy one."""
    from evaluation.errors import TextError
    from evaluation.open_ended import measure_prompts
    from server.console_eval import diversity_table

    with _evaluation(context, json_path) as llm:
        lines = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise TextError(f"{source} holds no prompts")
        as_chat = llm.tokenizer.has_chat_template if chat is None else chat
        prompts = [
            llm.tokenizer.encode_chat([{"role": "user", "content": line}]) if as_chat else llm.tokenizer.encode(line)
            for line in lines
        ]
        compared = _controls(llm, temperatures, probabilities)
        with _bars() as advance:
            results = measure_prompts(
                llm, prompts, compared, samples, max_tokens=text_tokens, seed=seed, progress=advance
            )
        Console().print(diversity_table(results))
        settings = {"prompts": len(prompts), "samples": samples, "max_tokens": text_tokens, "seed": seed}
        _write(json_path, "diversity", llm, settings, [result.to_json(with_texts) for result in results])


def print_perplexity(llm: "LLM", path: Path, max_tokens: int, console: Console) -> None:
    """Perplexity of the beginning of one text in each mode that the checkpoint allows: `siluette info --perplexity`."""
    from evaluation.grid import MODES_GRID, supported
    from server.console_eval import perplexity_table

    texts = _windows(llm, [path], None, max_tokens)
    console.print(perplexity_table(perplexity_of(llm, texts, supported(MODES_GRID, llm.info.support))))


def perplexity_of(
    llm: "LLM", texts: "list[TextWindows]", activations: "list[Activation]", *, seeds: int = 1, seed: int = 0
) -> "list[PerplexityResult]":
    """Measure each text with each activation, with a progress bar."""
    from evaluation.perplexity import measure_perplexity

    results = []
    for text in texts:
        for activation in activations:
            with _bar(f"{text.name}, {_name(activation)}") as advance:
                results.append(measure_perplexity(llm, text, activation, seeds=seeds, seed=seed, progress=advance))
    return results


@contextmanager
def _evaluation(context: typer.Context, json_path: Path | None, plot_path: Path | None = None) -> Iterator["LLM"]:
    """Check where results go, load the model, and turn errors into one line."""
    from engine import LLM, EngineError
    from evaluation.errors import EvaluationError, PlotError
    from evaluation.plots import FORMATS

    check_writable(json_path, "--json")
    check_writable(plot_path, "--plot")
    with errors_as_one_line(EngineError, EvaluationError, OSError, UnicodeDecodeError):
        if plot_path is not None and plot_path.suffix.lower() not in FORMATS:
            raise PlotError(f"a plot's file must end in {' or '.join(FORMATS)}, got {plot_path.name!r}")
        if plot_path is not None and find_spec("matplotlib") is None:
            raise PlotError("plots need matplotlib: install Siluette's extra 'eval'")
        with LLM(config=engine_config(context), progress=progress_on(Console(stderr=True))) as llm:
            yield llm


def _grid(llm: "LLM", specs: list[str] | None) -> list["Activation"]:
    """The activations that were asked for; else those of the default grid that the model may be run with."""
    from evaluation.grid import DEFAULT_GRID, parse_activation, supported

    if specs:
        return [parse_activation(spec) for spec in dict.fromkeys(specs)]
    if llm.config.allow_untuned_activations:
        return list(DEFAULT_GRID)
    return supported(DEFAULT_GRID, llm.info.support)


def _controls(llm: "LLM", temperatures: list[float] | None, probabilities: list[float] | None) -> list["Control"]:
    """The controls that were asked for; else those of the default grid that the model may be run with."""
    from engine import ActivationMode, Scope
    from evaluation import controls
    from evaluation.grid import supported

    def allowed(control: "Control") -> bool:
        return llm.config.allow_untuned_activations or bool(supported([control.activation], llm.info.support))

    chosen = [controls.temperature_control(one) for one in dict.fromkeys(temperatures or controls.TEMPERATURES)]
    for scope in Scope:
        for temperature in (0.0, controls.WARM):
            shares = dict.fromkeys(probabilities or controls.PROBABILITIES)
            chosen += [controls.stochastic_control(p, temperature, scope) for p in shares]
    chosen += [control for control in controls.default_controls() if control.activation.mode is ActivationMode.RELU]
    # What was asked for by name is refused by the engine if it has to be, and not left out in silence.
    return [
        control
        for control in chosen
        if allowed(control) or (probabilities and control.activation.mode is ActivationMode.STOCHASTIC)
    ]


def _windows(llm: "LLM", paths: list[Path], window: int | None, max_tokens: int | None) -> list["TextWindows"]:
    from evaluation.texts import DEFAULT_CONTEXT, cut_into_windows, load_text

    size = window or min(DEFAULT_CONTEXT, llm.info.max_model_len)
    return [cut_into_windows(llm, load_text(path), size, max_tokens) for path in paths]


def _prompt_for(llm: "LLM", asked: list["Question"]) -> tuple["PromptBuilder", list["Question"]]:
    """How questions are put to the model, and those that are left: without a chat template some become examples."""
    from evaluation.answers import chat_prompt, few_shot_prompt
    from evaluation.errors import QuestionError

    if llm.tokenizer.has_chat_template:
        return chat_prompt, asked
    if len(asked) <= NUM_EXAMPLES:
        raise QuestionError(
            f"a model without a chat template needs more than {NUM_EXAMPLES} questions: so many become examples"
        )
    examples = [(question.question, question.answers[0]) for question in asked[:NUM_EXAMPLES]]
    return few_shot_prompt(examples), asked[NUM_EXAMPLES:]


def _name(activation: "Activation") -> str:
    from evaluation.grid import describe

    return describe(activation)


def _progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, moved by (done, in all)."""
    with _progress_bar() as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each label, moved by (label, done, in all)."""
    with _progress_bar() as progress:
        tasks: dict[str, Any] = {}

        def advance(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label)
            progress.update(tasks[label], completed=done, total=total)

        yield advance


def _write(path: Path | None, name: str, llm: "LLM", settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    if path is None:
        return
    info = llm.info
    model = {
        "name": info.name,
        "adapter": info.adapter,
        "weights_digest": info.weights_digest,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "support": asdict(info.support),
        "kernels": info.kernels,
    }
    machine = asdict(describe_machine())
    write_json(path, {"evaluation": name, "model": model, "settings": settings, "machine": machine, "results": results})
