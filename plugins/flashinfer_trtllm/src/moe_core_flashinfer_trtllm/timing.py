"""How `tune` times a call: replays of a CUDA graph, so that the host's part does not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

#: Calls in a graph, replays that are timed, microseconds of replays that are enough for a reading.
CALLS, READINGS, ENOUGH_US = 4, 5, 3000.0


def microseconds(call: Callable[[], object], device: torch.device) -> float:
    """The median time of one call. Raises what `call` raises."""
    if device.type != "cuda":
        call()
        readings = []
        for _ in range(READINGS):
            start = time.perf_counter()
            call()
            readings.append((time.perf_counter() - start) * 1e6)
        return statistics.median(readings)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):  # workspaces of a new stream, lazily loaded kernels
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CALLS):
                call()
        first = _replays(graph, stream, 1)
        count = max(1, min(100, round(ENOUGH_US / max(first, 1.0))))
        readings = [_replays(graph, stream, count) for _ in range(READINGS)]
    torch.cuda.current_stream(device).wait_stream(stream)
    return statistics.median(readings) / CALLS


def _replays(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, count: int) -> float:
    """Microseconds of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record(stream)
    for _ in range(count):
        graph.replay()
    end.record(stream)
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / count
