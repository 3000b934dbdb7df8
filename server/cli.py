"""The command line: `siluette serve`, `generate`, `info`, `bench`, `eval` and `tune`.

Whatever loads torch is imported inside the commands, so that `siluette --help` answers at once.
"""

import math
import secrets
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from server import cli_eval, cli_tune
from server import cli_options as opt
from server.cli_eval_options import MEASURE
from server.cli_support import (
    check_writable,
    engine_config,
    errors_as_one_line,
    garbage_ignored,
    given,
    progress_on,
    write_json,
)
from server.loadgen import BenchConfig, Endpoint, run_benchmark, run_event_loop
from server.loadgen_client import RequestError, Target
from server.loadgen_report import print_report
from server.loadgen_workload import Length, ModeMix, Workload
from server.machine import describe_machine
from server.version import VERSION

if TYPE_CHECKING:
    from engine import LLM
    from server.settings import ServerSettings

ACTIVATION_OPTIONS = {"mode", "p", "scope", "activation_seed"}
SERVER, WORKLOAD, REQUESTS = "Server", "Workload", "Requests"

app = typer.Typer(
    help="Text generation in which every request chooses how its feed-forward layers are activated.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_eval.app, name="eval")
app.command()(cli_tune.tune)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"siluette {VERSION}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Text generation in which every request chooses how its feed-forward layers are activated."""


@app.command()
def serve(
    context: typer.Context,
    model: opt.Model = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on.", show_default="127.0.0.1", rich_help_panel=SERVER),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port to listen on; 0 lets the system choose one.",
            show_default="8000",
            rich_help_panel=SERVER,
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="Name of the model in the API.", show_default="the model's own name", rich_help_panel=SERVER),
    ] = None,
    log_level: Annotated[
        opt.LogLevelName | None,
        typer.Option(help="Least severe messages that are logged.", show_default="info", rich_help_panel=SERVER),
    ] = None,
    access_log: Annotated[
        bool | None,
        typer.Option("--access-log", help="Log a line for each HTTP request.", rich_help_panel=SERVER),
    ] = None,
    drain_delay: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds after SIGTERM in which requests are still taken while /health/ready says 503.",
            show_default="0.0",
            rich_help_panel=SERVER,
        ),
    ] = None,
    shutdown_timeout: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds that running requests get to finish, from SIGTERM and the drain delay on.",
            show_default="30.0",
            rich_help_panel=SERVER,
        ),
    ] = None,
    max_body_bytes: Annotated[
        int | None,
        typer.Option(
            min=1024,
            help="Longest request body; a longer one is answered with 413.",
            show_default="4194304",
            rich_help_panel=SERVER,
        ),
    ] = None,
    max_prompts: Annotated[
        int | None,
        typer.Option(min=1, help="Most prompts in one completion request.", show_default="128", rich_help_panel=SERVER),
    ] = None,
    cors_origins: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            help="Origin whose pages may call the API from a browser; may be given several times.",
            show_default="none",
            rich_help_panel=SERVER,
        ),
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            help="OpenTelemetry collector (OTLP over HTTP) that gets a trace of each request; needs the extra 'otel'.",
            metavar="URL",
            show_default="none",
            rich_help_panel=SERVER,
        ),
    ] = None,
    adapter: opt.Adapter = None,
    dtype: opt.DTypeOption = None,
    quantize: opt.Quantize = None,
    device: opt.Device = None,
    max_model_len: opt.MaxModelLen = None,
    max_num_seqs: opt.MaxNumSeqs = None,
    max_num_batched_tokens: opt.MaxNumBatchedTokens = None,
    max_waiting: opt.MaxWaiting = None,
    kv_cache_mib: opt.KvCacheMib = None,
    prefix_caching: opt.PrefixCaching = None,
    ffn_path: opt.FfnPathOption = None,
    kernels: opt.KernelsOption = None,
    allow_untuned_activations: opt.AllowUntuned = None,
    threads: opt.Threads = None,
    pin_threads: opt.PinThreads = None,
) -> None:
    """Serve a model with OpenAI's API.

    Options of the panel "Server" may also come from the environment: SILUETTE_PORT=9000.
    """
    with garbage_ignored():
        from engine import EngineError
        from server.serve import serve as run_server

    settings = _server_settings(context)
    with errors_as_one_line(EngineError, OSError):
        run_server(engine_config(context), settings, progress=typer.echo)


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="Text to continue or to answer; '-' reads standard input.")],
    model: opt.ModelOption = None,
    mode: opt.Mode = None,
    p: opt.P = None,
    scope: opt.ScopeOption = None,
    activation_seed: opt.ActivationSeed = None,
    n: opt.N = None,
    temperature: opt.Temperature = None,
    top_p: opt.TopP = None,
    top_k: opt.TopK = None,
    min_p: opt.MinP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    seed: opt.Seed = None,
    max_tokens: opt.MaxTokens = 128,
    stop: opt.Stop = None,
    ignore_eos: opt.IgnoreEos = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Send the prompt as a user's message, or continue it as it is.",
            show_default="chat if the model has a chat template",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of a chat.")] = None,
    adapter: opt.Adapter = None,
    dtype: opt.DTypeOption = None,
    quantize: opt.Quantize = None,
    device: opt.Device = None,
    max_model_len: opt.MaxModelLen = None,
    kv_cache_mib: opt.KvCacheMib = None,
    ffn_path: opt.FfnPathOption = None,
    kernels: opt.KernelsOption = None,
    allow_untuned_activations: opt.AllowUntuned = None,
    threads: opt.Threads = None,
) -> None:
    """Generate text without a server: one sample streams, several stand side by side."""
    with garbage_ignored():
        from engine import LLM, Activation, EngineError, SamplingParams
        from server.console import print_footer, print_generation

    if system is not None and chat is False:
        raise typer.BadParameter("a system message needs a chat", param_hint="--system")
    chosen = {name.removeprefix("activation_"): value for name, value in given(context, ACTIVATION_OPTIONS).items()}
    log = Console(stderr=True)
    with errors_as_one_line(EngineError, OSError):
        # Both check themselves: before the seconds that loading takes.
        sampling = SamplingParams(**given(context, {field.name for field in fields(SamplingParams)}))
        activation = Activation(**chosen)
        with LLM(config=engine_config(context), progress=progress_on(log)) as llm:
            ids = _prompt_ids(llm, sys.stdin.read() if prompt == "-" else prompt, chat, system)
            started = time.perf_counter()
            output = print_generation(Console(), log, llm.stream(ids, sampling, activation), sampling.n)
            print_footer(log, output, time.perf_counter() - started, llm.stats())


@app.command()
def info(
    context: typer.Context,
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    dtype: opt.DTypeOption = None,
    quantize: opt.Quantize = None,
    device: opt.Device = None,
    max_model_len: opt.MaxModelLen = None,
    kv_cache_mib: opt.KvCacheMib = None,
    kernels: opt.KernelsOption = None,
    threads: opt.Threads = None,
    perplexity: Annotated[
        Path | None,
        typer.Option(
            help="Text to measure the perplexity of, in each mode that the checkpoint allows; see 'siluette eval'.",
            exists=True,
            show_default=False,
            rich_help_panel=MEASURE,
        ),
    ] = None,
    text_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Tokens of the text that count.", rich_help_panel=MEASURE)
    ] = 2048,
) -> None:
    """Load a model and show its modes, kernels and memory; with a text, its perplexity too."""
    with garbage_ignored():
        from engine import LLM, EngineError
        from evaluation.errors import EvaluationError
        from server.console import model_table

    out = Console()
    with (
        errors_as_one_line(EngineError, EvaluationError, OSError),
        LLM(config=engine_config(context), progress=progress_on(Console(stderr=True))) as llm,
    ):
        out.print(model_table(llm.info))
        if perplexity is not None:
            out.print()
            cli_eval.print_perplexity(llm, perplexity, text_tokens, out)


@app.command()
def bench(
    base_url: Annotated[
        str, typer.Option(help="Address of the server, with or without /v1.", rich_help_panel=REQUESTS)
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None,
        typer.Option(
            help="Name of the model.", show_default="the first one that the server lists", rich_help_panel=REQUESTS
        ),
    ] = None,
    endpoint: Annotated[Endpoint, typer.Option(help="Which API to use.", rich_help_panel=REQUESTS)] = "completions",
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="OPENAI_API_KEY", help="Sent as a bearer token.", show_default=False, rich_help_panel=REQUESTS
        ),
    ] = None,
    num_requests: Annotated[int, typer.Option(min=1, help="Measured requests.", rich_help_panel=WORKLOAD)] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Most requests in flight.", rich_help_panel=WORKLOAD)] = 16,
    request_rate: Annotated[
        float,
        typer.Option(
            help="Mean arrivals per second, at random times (Poisson); inf: as many as concurrency allows.",
            rich_help_panel=WORKLOAD,
        ),
    ] = math.inf,
    prompt_tokens: Annotated[
        str, typer.Option(help="Length of the prompts: '128', or '128+-64' for a range.", rich_help_panel=WORKLOAD)
    ] = "128",
    output_tokens: Annotated[
        str, typer.Option(help="Length of the answers, likewise.", rich_help_panel=WORKLOAD)
    ] = "64",
    shared_prefix_tokens: Annotated[
        int,
        typer.Option(
            min=0, help="So many tokens at the beginning are the same in all prompts.", rich_help_panel=WORKLOAD
        ),
    ] = 0,
    mode_mix: Annotated[
        str,
        typer.Option(
            help="Shares of the activation modes, such as 'silu=1,stochastic=1,relu=1'. With silu alone, no field is "
            "sent that other servers might not know.",
            rich_help_panel=WORKLOAD,
        ),
    ] = "silu",
    warmup: Annotated[
        int, typer.Option(min=0, help="Requests before the measured ones.", rich_help_panel=WORKLOAD)
    ] = 8,
    seed: Annotated[
        int | None,
        typer.Option(
            help="The same seed and settings give the same requests, which a server that is still running has in its "
            "prefix cache.",
            show_default="drawn, and reported",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    p: opt.P = None,
    scope: opt.ScopeOption = None,
    temperature: Annotated[float, typer.Option(help="Of all requests.", rich_help_panel=opt.SAMPLING)] = 1.0,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            help="Ask for answers of exactly the planned length, an extension of OpenAI's API.",
            rich_help_panel=opt.SAMPLING,
        ),
    ] = True,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds that a request may take.", rich_help_panel=REQUESTS)
    ] = 600.0,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", dir_okay=False, help="Write settings, machine and figures here.", show_default=False),
    ] = None,
) -> None:
    """Measure a server: throughput, time to first token and latencies. Any server with OpenAI's API will do."""
    check_writable(json_path, "--json")
    try:
        lengths = Length.parse(prompt_tokens), Length.parse(output_tokens)
        mix = ModeMix.parse(mode_mix)
        seed = secrets.randbits(31) if seed is None else seed
        config = BenchConfig(
            target=Target.parse(base_url, api_key),
            workload=Workload(num_requests, *lengths, mix, request_rate, shared_prefix_tokens, seed),
            model=model,
            endpoint=endpoint,
            concurrency=concurrency,
            warmup=warmup,
            p=p,
            scope=scope,
            temperature=temperature,
            ignore_eos=ignore_eos,
            timeout=timeout,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with errors_as_one_line(RequestError, OSError):
        report = run_event_loop(run_benchmark(config, progress_on(Console(stderr=True))))
        print_report(report, Console())
        if json_path is not None:
            document = {"benchmark": "serving", "machine": asdict(describe_machine()), **report.to_json()}
            write_json(json_path, document)
    if not report.total.completed:
        raise typer.Exit(1)


def _server_settings(context: typer.Context) -> "ServerSettings":
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from server.settings import ServerSettings

    try:
        return ServerSettings(**given(context, set(ServerSettings.model_fields)))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise typer.BadParameter("; ".join(problems), param_hint="the server's settings") from error
    except SettingsError as error:
        raise typer.BadParameter(str(error), param_hint="the server's settings") from error


def _prompt_ids(llm: "LLM", prompt: str, chat: bool | None, system: str | None) -> list[int]:
    if chat is False or (chat is None and not llm.tokenizer.has_chat_template):
        return llm.tokenizer.encode(prompt)
    messages = [] if system is None else [{"role": "system", "content": system}]
    return llm.tokenizer.encode_chat([*messages, {"role": "user", "content": prompt}])


if __name__ == "__main__":
    app()
