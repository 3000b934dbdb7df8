"""Siluette and its peers: vLLM, llama.cpp and transformers, with the same model under the same loads on one machine.

Servers are driven by the load generator of `siluette bench`. One peer runs at a time, all of them take turns within
each round, and figures are medians of the rounds. A peer that cannot be installed or started stays in the result with
its reason.
"""

import argparse
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.peers_catalogue import OWN_ENVIRONMENT, PEERS, Site, describe
from bench.peers_models import model_files, prepare_models
from bench.peers_results import Record, compare
from bench.peers_session import Session, Settings, run_session
from bench.peers_setup import (
    ENVIRONMENTS,
    PeerError,
    add_setup_options,
    prepare_environment,
    versions,
)
from bench.results import FOLDER, add_out_option, save
from server.loadgen import run_event_loop

PICTURE_FORMATS = (".svg", ".png")  # `evaluation.plots.FORMATS`, without the import of torch
PICTURE = FOLDER.parents[1] / "docs" / "images" / "peers.svg"


def prepare(names: list[str], site: Site, torch_options: list[str]) -> dict[str, Record]:
    """Make what some peers need.

    Returns:
        A record for each peer, with the reason if its environment could not be made.
    """
    installed: dict[str, dict[str, str]] = {OWN_ENVIRONMENT: {}}
    failures: dict[str, str] = {}
    wanted = {PEERS[name].environment for name in names}
    for environment in (name for name in ENVIRONMENTS if name in wanted):
        try:
            prepare_environment(environment, site.folder, torch_options, print)
            prepare_models(environment, site.folder, site.models, print)
            installed[environment] = versions(environment, site.folder)
        except PeerError as error:
            print(error)
            failures[environment] = str(error)
    records = {}
    for name in names:
        peer = PEERS[name]
        records[name] = Record(peer.title, describe(peer, site), installed.get(peer.environment, {}))
        if reason := failures.get(peer.environment):
            records[name].errors.append(reason)
    return records


async def run_rounds(records: dict[str, Record], site: Site, settings: Settings, options: argparse.Namespace) -> Path:
    """All rounds; the result file is written after each of them.

    Returns:
        The file.
    """
    path: Path = options.out
    for number in range(options.rounds):
        for name, record in records.items():
            if record.hopeless:
                continue
            print(f"Round {number + 1} of {options.rounds}: {record.title}", flush=True)
            try:
                session = await run_session(PEERS[name], site, settings, number)
            except PeerError as error:
                record.errors.append(f"{error}")
                print(f"  {error}", flush=True)
            else:
                record.sessions.append(session)
                print(f"  {summary(session)}", flush=True)
        path = save("peers", {**asdict(settings), "rounds": number + 1}, results_of(records), options.out)
    return path


def summary(session: Session) -> str:
    """One line about one round."""
    parts = [f"{load.tokens_per_second:.1f} tokens/s at {load.streams}" for load in session.loads]
    if session.ttft_ms is not None:
        parts.append(f"first token {session.ttft_ms:.0f} ms")
    if session.seconds_to_ready is not None:
        parts.append(f"ready after {session.seconds_to_ready:.1f} s")
    if session.memory_mib is not None:
        parts.append(f"{session.memory_mib:.0f} MiB")
    return ", ".join([*parts, *session.complaints])


def results_of(records: dict[str, Record]) -> dict[str, Any]:
    """The result file's figures."""
    peers = {name: record.to_json() for name, record in records.items()}
    return {"peers": peers, "ratios": compare(peers)}


def print_results(results: dict[str, Any], streams: tuple[int, ...], console: Console) -> None:
    """Print the tables of a run."""
    table = Table(title="Output tokens per second", title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column()
    for number in streams:
        table.add_column(f"{number}", justify="right", no_wrap=True)
    for title in ("first token", "ready", "memory"):
        table.add_column(title, justify="right", no_wrap=True)

    def cell(entry: dict[str, Any] | None, form: str, unit: str = "") -> str:
        return "-" if entry is None else f"{entry['median']:{form}}{unit}"

    for peer in results["peers"].values():
        loads = [peer.get("streams", {}).get(str(number), {}).get("tokens_per_second") for number in streams]
        table.add_row(
            peer["title"],
            *(cell(load, ".1f") for load in loads),
            cell(peer.get("ttft_ms"), ".0f", " ms"),
            cell(peer.get("seconds_to_ready"), ".1f", " s"),
            cell(peer.get("memory_mib"), ".0f", " MiB"),
        )
    console.print(table)
    ratios = Table(title="Targets", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for title in ("", "value", "wanted", "met"):
        ratios.add_column(title, justify="right" if title == "value" else "left")
    for row in results["ratios"]:
        wanted = next(
            (f"{sign} {row[key]:g}" for key, sign in (("at_least", ">="), ("at_most", "<=")) if key in row), "-"
        )
        absent = f" ({len(row['missing'])} peers have no figure)" if "missing" in row else ""
        ratios.add_row(
            row["title"] + absent, f"{row['value']:g}", wanted, {True: "yes", False: "no"}.get(row.get("met"), "-")
        )
    console.print(ratios)
    for peer in results["peers"].values():
        for error in peer.get("errors", ()):
            console.print(f"{peer['title']}: {error}", style="red", markup=False, highlight=False)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="default: 1 8 32")
    parser.add_argument("--requests", type=int, default=4, help="least requests of a load (default: 4)")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--output-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--long-prompt", type=int, default=512, metavar="N", help="for the first token (default: 512)")
    parser.add_argument("--memory-streams", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument("--memory-tokens", type=int, default=512, metavar="N", help="prompt and output (default: 512)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=cores, metavar="N", help="of every peer (default: one per core)")
    parser.add_argument("--start-timeout", type=float, default=900.0, metavar="SECONDS", help="default: 900")
    parser.add_argument("--request-timeout", type=float, default=900.0, metavar="SECONDS", help="default: 900")
    parser.add_argument(
        "--plot",
        type=Path,
        nargs="?",
        const=PICTURE,
        metavar="FILE",
        help="draw it (default FILE: docs/images/peers.svg)",
    )
    add_setup_options(parser)
    add_out_option(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.plot is not None and options.plot.suffix.lower() not in PICTURE_FORMATS:
        parser.error(f"--plot must name a file that ends in {' or '.join(PICTURE_FORMATS)}, got {options.plot.name!r}")
    for name in ("requests", "prompt_tokens", "output_tokens", "long_prompt", "memory_streams", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if min(options.streams) < 1 or options.memory_tokens < 2:
        parser.error("--streams must be at least 1 and --memory-tokens at least 2")
    settings = Settings(
        streams=tuple(sorted(set(options.streams))),
        requests=options.requests,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        long_prompt=options.long_prompt,
        memory_streams=options.memory_streams,
        memory_tokens=options.memory_tokens,
        threads=options.threads,
        start_timeout=options.start_timeout,
        request_timeout=options.request_timeout,
    )
    names = [name for name in PEERS if name in options.peers]
    try:
        site = Site(options.venvs, model_files(options.venvs), options.threads)
    except PeerError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a server that runs is stopped then, too
    records = prepare(names, site, options.torch_args.split())
    path = run_event_loop(run_rounds(records, site, settings, options))
    results = results_of(records)
    print_results(results, settings.streams, Console())
    if options.plot is not None:
        from bench.peers_plot import plot  # loads torch, which the load generator should not have in its process

        plot(results["peers"], options.plot)
        print(f"Drawn in {options.plot}")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
