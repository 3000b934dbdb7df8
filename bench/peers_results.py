"""From rounds to results: medians of each peer, and how Siluette compares with them where the project has a target."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.peers_session import Load, Session
from bench.results import spread

Figure = Callable[[Mapping[str, Any]], float | None]


@dataclass(slots=True)
class Record:
    """What is known about a peer.

    Attributes:
        title: For people.
        command: How it was run, without what is particular to this machine.
        versions: Installed versions of what it is made of.
        sessions: Complete rounds.
        errors: Why others were not.
    """

    title: str
    command: str
    versions: dict[str, str] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def hopeless(self) -> bool:
        """Whether it failed and never worked: it is not tried again."""
        return bool(self.errors) and not self.sessions

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values, with their spread over the rounds. What was not measured is left out."""
        document: dict[str, Any] = {"title": self.title, "command": self.command, "versions": self.versions}
        document["rounds"] = len(self.sessions)
        if self.sessions:
            document["streams"] = _loads_to_json([load for session in self.sessions for load in session.loads])
            for name in ("ttft_ms", "seconds_to_ready", "memory_mib", "peak_memory_mib"):
                values = [value for session in self.sessions if (value := getattr(session, name)) is not None]
                if values:
                    document[name] = spread(values)
            if build := self.sessions[-1].build:
                document["build"] = build
        complaints = dict.fromkeys(text for session in self.sessions for text in session.complaints)
        if errors := [*dict.fromkeys(self.errors), *complaints]:
            document["errors"] = errors
        return document


def _loads_to_json(loads: Sequence[Load]) -> dict[str, Any]:
    document = {}
    for streams in sorted({load.streams for load in loads}):
        rounds = [load for load in loads if load.streams == streams]
        entry: dict[str, Any] = {
            "requests": sum(load.requests for load in rounds),
            "failed": sum(load.failed for load in rounds),
            "output_tokens": sum(load.output_tokens for load in rounds),
            "tokens_per_second": spread([load.tokens_per_second for load in rounds]),
        }
        decode = [rate for load in rounds if (rate := load.decode_tokens_per_second) is not None]
        if decode:
            entry["decode_tokens_per_second"] = spread(decode)
        document[str(streams)] = entry
    return document


@dataclass(frozen=True, slots=True)
class Target:
    """One row of what the project wants.

    Attributes:
        title: For people.
        figure: Takes a figure out of a peer's results.
        ours: Siluette's peer.
        peers: The best of these is compared with; none: the figure itself has the limit.
        limit: Of the ratio ours / peer, or of the figure; None: reported only.
        higher_is_better: Of the figure. The limit is the least value then, else the greatest.
    """

    title: str
    figure: Figure
    ours: str
    peers: tuple[str, ...] = ()
    limit: float | None = None
    higher_is_better: bool = True


def rate(streams: int, name: str = "tokens_per_second") -> Figure:
    """Median output tokens per second at a number of streams."""

    def figure(peer: Mapping[str, Any]) -> float | None:
        value = peer.get("streams", {}).get(str(streams), {}).get(name, {}).get("median")
        return None if value is None else float(value)

    return figure


def median(name: str) -> Figure:
    """Median of another figure."""

    def figure(peer: Mapping[str, Any]) -> float | None:
        value = peer.get(name, {}).get("median")
        return None if value is None else float(value)

    return figure


VLLM = ("vllm", "vllm-auto")
BATCHING = (*VLLM, "transformers-serve", "transformers-generate")
ALL_PEERS = (
    *BATCHING,
    *(f"llama-{weights}{how}" for weights in ("bf16", "q8_0", "q4_1") for how in ("", "-capi")),
)
DECODE = "decode_tokens_per_second"
TARGETS = (
    Target("one stream, bf16 / llama.cpp bf16, C API", rate(1), "siluette-bf16", ("llama-bf16-capi",), 1.0),
    Target("the same while decoding", rate(1, DECODE), "siluette-bf16", ("llama-bf16-capi",)),
    Target("one stream, bf16 / vLLM", rate(1), "siluette-bf16", VLLM, 1.6),
    Target("one stream, int8 / llama.cpp Q8_0, C API", rate(1), "siluette-int8", ("llama-q8_0-capi",), 1.4),
    Target("the same while decoding", rate(1, DECODE), "siluette-int8", ("llama-q8_0-capi",)),
    Target("one stream, int4 / llama.cpp Q4_1, C API", rate(1), "siluette-int4", ("llama-q4_1-capi",), 1.6),
    Target("the same while decoding", rate(1, DECODE), "siluette-int4", ("llama-q4_1-capi",)),
    Target("one stream, bf16, RELU / SILU", rate(1), "siluette-bf16-relu", ("siluette-bf16",), 1.35),
    Target("the same while decoding", rate(1, DECODE), "siluette-bf16-relu", ("siluette-bf16",)),
    Target("one stream, int8, RELU / SILU", rate(1), "siluette-int8-relu", ("siluette-int8",)),
    Target("one stream, int4, RELU / SILU", rate(1), "siluette-int4-relu", ("siluette-int4",)),
    Target("8 streams, bf16 / the better of vLLM and transformers", rate(8), "siluette-bf16", BATCHING, 2.0),
    Target("32 streams, bf16 / the better of vLLM and transformers", rate(32), "siluette-bf16", BATCHING, 1.4),
    Target("time to first token, bf16 / fastest peer", median("ttft_ms"), "siluette-bf16", ALL_PEERS, 0.9, False),
    Target("resident memory, bf16, MiB", median("memory_mib"), "siluette-bf16", (), 1.2e9 / 2**20, False),
    Target("seconds to ready, bf16", median("seconds_to_ready"), "siluette-bf16", (), 5.0, False),
)


def compare(peers: Mapping[str, Mapping[str, Any]], targets: Sequence[Target] = TARGETS) -> list[dict[str, Any]]:
    """Ratios of medians, one entry for each target whose figures exist.

    Args:
        peers: Name -> what `Record.to_json` gives.
        targets: The rows.

    Returns:
        For each: `value` (the ratio, or the figure where nothing is compared), the two figures and whose the other is,
        the `missing` peers without one, and where there is a limit, `met`.
    """
    return [row for target in targets if (row := _row(target, peers)) is not None]


def _row(target: Target, peers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    ours = target.figure(peers.get(target.ours, {}))
    if ours is None:
        return None
    row: dict[str, Any] = {"title": target.title, "ours": target.ours, "our_figure": ours}
    value = ours
    if target.peers:
        figures = {name: figure for name in target.peers if (figure := target.figure(peers.get(name, {})))}
        if not figures:
            return None
        best = (max if target.higher_is_better else min)(figures, key=lambda name: figures[name])
        value = ours / figures[best]
        row |= {"peer": best, "peer_figure": figures[best]}
        if missing := [name for name in target.peers if name not in figures]:
            row["missing"] = missing
    row["value"] = round(value, 3)
    if target.limit is not None:
        row["at_least" if target.higher_is_better else "at_most"] = round(target.limit, 3)
        row["met"] = value >= target.limit if target.higher_is_better else value <= target.limit
    return row
