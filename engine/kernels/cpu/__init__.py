"""Numba kernels for the CPU, compiled once and cached on disk."""

import hashlib
import os
from functools import cache
from pathlib import Path

import numba


@cache
def sources_digest() -> str:
    """Of everything that kernels are compiled from, constants included, and that their costs are measured with."""
    sources = [
        *sorted(Path(__file__).parent.glob("*.py")),
        *(Path(__file__).parents[2] / name for name in ("activation.py", "ffn_probe.py", "kv_cache.py", "philox.py")),
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def _use_cache_of_these_sources() -> None:
    """Cache compiled kernels under a name made from all kernel sources.

    Numba's own cache looks at the file of a kernel only, so after a change in a function that it inlines from another
    file it would go on running the old code. `NUMBA_CACHE_DIR` overrides the place.
    """
    if "NUMBA_CACHE_DIR" in os.environ:
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    numba.config.CACHE_DIR = str(root / "siluette" / "kernels" / sources_digest())


_use_cache_of_these_sources()
