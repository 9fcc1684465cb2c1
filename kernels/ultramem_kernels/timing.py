"""Times of calls on a GPU: by events around one call, by replays of a CUDA graph, and of the host that launches them.

All are medians in milliseconds, of calls on the current device. Which to use: `eager_ms` for what a caller waits for,
launches included; `graph_ms` for what the GPU computes; `host_ms` for what Python costs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def eager_ms(call: Callable[[], object], repeats: int = 20, warm_up: int = 5) -> float:
    """Time of a call on the current stream, launched when the stream is empty; `warm_up` calls before do not count."""
    times = []
    for _ in range(warm_up + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[warm_up:])


def graph_ms(calls: Sequence[Callable[[], object]], repeats: int = 5, warm_up_ms: float = 100.0) -> float:
    """Time of one call, from replays of a graph that holds all of `calls` once.

    Several calls on different data keep the caches from being warm. Replays follow each other without a gap, after
    `warm_up_ms` that do not count: a GPU that was idle runs memory-bound kernels 15 % slower for some milliseconds.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in [*calls, *calls]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    once = _replay_ms(graph, 2)
    _replay_ms(graph, int(warm_up_ms / once) + 1)
    number = int(20 / once) + 1
    return statistics.median(_replay_ms(graph, number) for _ in range(repeats)) / len(calls)


def _replay_ms(graph: torch.cuda.CUDAGraph, number: int) -> float:
    """Mean time of a replay, of `number` behind each other."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(number):
        graph.replay()
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end) / number, 1e-4)


def host_ms(call: Callable[[], object], calls: int = 8, repeats: int = 7) -> float:
    """Time that the host takes to launch a call; few at a time, so that the GPU's queue never fills."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)
