"""How long the named parts of a step take on this rank: data, forward, backward, exchange, and so on.

`Spans` is what Megatron calls a timers object: its schedules and optimizer start and stop spans by their own names
(forward-compute, all-grads-sync, ...); data loading, the memory exchange and the whole step are added by us. On a GPU a
span is a pair of events on the current stream, so that nothing waits for the device before `read`; on a CPU it is a
clock. With `annotate` a span is also a range in the trace of torch's profiler, with `nvtx` one in that of nsys.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
STEP, DATA, EXCHANGE, GRAD_SYNC, OPTIMIZER = "step", "data", "exchange", "grad_sync", "optimizer"


class Spans:
    """Sums of the times of spans over the steps since the last `read`.

    Only what happens within `step` counts (not an evaluation), and not the first step of a launch, which builds caches
    and compiles kernels.
    """

    def __init__(self, device: torch.device, *, nvtx: bool = False) -> None:
        self.on_gpu, self.nvtx, self.annotate = device.type == "cuda", nvtx, False
        self._spans: dict[str, Span] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []
        self._steps, self._warm, self._counting = 0, False, False

    def __call__(self, name: str, log_level: int | None = None) -> Span:
        """The span of that name; the second argument is Megatron's."""
        if name not in self._spans:
            self._spans[name] = Span(self, name)
        return self._spans[name]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one training step."""
        self._counting = self._warm
        try:
            with self.measure(STEP):
                yield
            self._steps += self._counting
        finally:
            self._counting, self._warm = False, True
        while self._events and self._events[0][2].query():  # or steps without a read would pile them up
            self._take_oldest()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """The time between entering and leaving, on the device."""
        span = self(name)
        span.start()
        try:
            yield
        finally:
            span.stop()

    def loading(self, batches: Callable[[int], Iterator[Item]]) -> Callable[[int], Iterator[Item]]:
        """The same iterators, by model chunk; the time that the host waits for their items is the span `data`."""
        return lambda chunk: self._waited_for(batches(chunk))

    def _waited_for(self, items: Iterator[Item]) -> Iterator[Item]:
        while True:
            started = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            if self._counting:
                self._seconds[DATA] += time.perf_counter() - started
            yield item

    def read(self) -> tuple[int, dict[str, float]]:
        """Steps since the last read and the seconds of each span in them. Waits for the device."""
        while self._events:
            self._events[0][2].synchronize()
            self._take_oldest()
        steps, seconds = self._steps, dict(self._seconds)
        self._steps = 0
        self._seconds.clear()
        return steps, seconds

    def _take_oldest(self) -> None:
        name, begin, end = self._events.popleft()
        self._seconds[name] += begin.elapsed_time(end) / 1e3
        self._spare += (begin, end)

    def _mark(self) -> torch.cuda.Event | float:
        if not self.on_gpu:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, name: str, begin: Any) -> None:
        end: Any = self._mark()
        if self.on_gpu:
            self._events.append((name, begin, end))
        else:
            self._seconds[name] += end - begin


class Span:
    """One name, started and stopped in turn. `barrier` is Megatron's and does nothing: measuring makes no rank wait."""

    def __init__(self, spans: Spans, name: str) -> None:
        self._spans, self.name = spans, name
        self._begin: torch.cuda.Event | float | None = None
        self._range: Any = None

    def start(self, barrier: bool = False) -> None:
        if self._spans.annotate:
            self._range = torch.profiler.record_function(self.name)
            self._range.__enter__()
        if self._spans.nvtx:
            torch.cuda.nvtx.range_push(self.name)
        self._begin = self._spans._mark() if self._spans._counting else None

    def stop(self, barrier: bool = False) -> None:
        if self._begin is not None:
            self._spans._add(self.name, self._begin)
            self._begin = None
        if self._spans.nvtx:
            torch.cuda.nvtx.range_pop()
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
