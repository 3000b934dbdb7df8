"""Times launches as serving runs them: replayed as a CUDA graph, measured by the device's own clock."""

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP = 2  # calls before a capture: the first ones compile


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The launches of a call as a graph that is replayed; without CUDA, under Triton's interpreter, the call itself."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], object] = graph.replay
    return replay


def seconds(replay: Callable[[], object], device: torch.device) -> float:
    """One call of what `captured` gave, after one that is not timed."""
    replay()
    if device.type != "cuda":
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of several replays."""
    replay = captured(call, device)
    return statistics.median(seconds(replay, device) for _ in range(repeats))
