"""Measured costs on disk beside the compiled kernels, so that a second start need not measure again.

A file belongs to one kind of processor, number of threads, model shape, format and version of the kernels. Anything
wrong with it means measuring. Deleting it is always safe, for both paths give the same results.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import llvmlite.binding
import numba

from engine.ffn_router import MEASURED_ROWS, FfnCosts
from engine.kernels.cpu import sources_digest


def cached_costs(subject: str, measure: Callable[[], FfnCosts], folder: Path | None = None) -> FfnCosts:
    """Costs from disk, else measured and kept, if they can be.

    Args:
        subject: What they are of: all that they depend on but the processor and the kernels.
        measure: Measures them.
        folder: Where files are; by default that of the compiled kernels.
    """
    what = f"{subject} {llvmlite.binding.get_host_cpu_name()} {numba.__version__} {sources_digest()}"
    name = f"ffn-costs-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"
    path = (Path(numba.config.CACHE_DIR) if folder is None else folder) / name
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return _read(path)
    costs = measure()
    with suppress(OSError):
        _write(path, costs)
    return costs


def _read(path: Path) -> FfnCosts:
    costs = FfnCosts(**{name: tuple(map(float, seconds)) for name, seconds in json.loads(path.read_text()).items()})
    if any(len(seconds) != len(MEASURED_ROWS) for seconds in asdict(costs).values()):
        raise ValueError("costs of other numbers of rows")
    return costs


def _write(path: Path, costs: FfnCosts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        json.dump(asdict(costs), file)
    os.replace(file.name, path)  # other processes find all of it or nothing
