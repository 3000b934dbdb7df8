"""`python -m bench`: run the benchmarks with their defaults, or the ones that are named."""

import argparse
import importlib

BENCHMARKS = (
    "engine_throughput",
    "http_overhead",
    "observability",
    "turns",
    "neighbours",
    "serving",
    "relu_speed",
    "ffn",
    "decode",
)
# One takes a corpus, one installs other servers, two need a GPU.
NAMED_ONLY = ("pretraining", "peers", "ffn_gpu", "decode_gpu")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"default: {', '.join(BENCHMARKS)}; or {', '.join(NAMED_ONLY)}"
    )
    names = parser.parse_args().names or BENCHMARKS
    known = (*BENCHMARKS, *NAMED_ONLY)
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    for name in names:
        print(f"== {name}", flush=True)
        importlib.import_module(f"bench.{name}").main([])


if __name__ == "__main__":
    main()
