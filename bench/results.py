"""Where results go, and in what form: one helper for all benchmarks."""

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.machine import describe_machine

FOLDER = Path(__file__).parent / "results"


def add_out_option(parser: argparse.ArgumentParser) -> None:
    """Add `--out`, the folder that `save` writes to."""
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="default: bench/results")


def plot_path(text: str) -> Path:
    """The file of `--plot`, for argparse.

    Raises:
        argparse.ArgumentTypeError: No picture can have that suffix.
    """
    from evaluation.plots import FORMATS  # loads torch, which benchmarks of other servers do without

    path = Path(text)
    if path.suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(f"must end in {' or '.join(FORMATS)}, got {path.name!r}")
    return path


def save(
    benchmark: str, settings: dict[str, Any], results: Any, folder: Path, device: dict[str, Any] | None = None
) -> Path:
    """Write a result with the machine's description to `<folder>/<benchmark>-<processor>.json`, over an older one.

    Args:
        benchmark: Name of the benchmark.
        settings: What it ran with, as JSON values.
        results: What it measured, as JSON values.
        folder: Is made if it does not exist.
        device: Description of the GPU that was measured, with its `name`, which then stands in the file's name.

    Returns:
        The file.
    """
    machine = describe_machine()
    document = {
        "benchmark": benchmark,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine),
        **({} if device is None else {"device": device}),
        "settings": settings,
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    slug = machine.slug if device is None else re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-")
    path = folder / f"{benchmark}-{slug}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path


def spread(values: Sequence[float], digits: int = 2) -> dict[str, float]:
    """Median, least and greatest of the rounds of one measurement."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in figures.items()}
