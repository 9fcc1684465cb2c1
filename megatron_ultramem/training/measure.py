"""What benchmarks measure of a training run: the time of an action, and what the GPU did meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from megatron_ultramem.results import Row
from megatron_ultramem.training.garbage import collected_every
from megatron_ultramem.training.loop import micro_batches
from megatron_ultramem.training.memory_hooks import begin_step, model_graph
from megatron_ultramem.training.setup import Run
from megatron_ultramem.training.step import forward_backward


@dataclass(frozen=True)
class Span:
    """One kernel or copy on the GPU; times in microseconds."""

    name: str
    stream: int
    begin: float
    end: float


def forward_backward_only(run: Run, count: int) -> None:
    """Over `count` micro-batches on every rank, gradient reduction included; nothing is updated."""
    ready(run)
    passes(run, count)


def ready(run: Run) -> None:
    """What comes before the forward and backward of a step."""
    begin_step(run.memory_hooks)
    for chunk in run.chunks:
        chunk.zero_grad_buffer()


def passes(run: Run, count: int) -> None:
    """Forward and backward over `count` micro-batches on every rank, gradient reduction included."""
    forward_backward(
        run.config,
        run.megatron_config,
        run.chunks,
        micro_batches(run.train_data, 0, count),
        count,
        run.platform.device,
        graph=model_graph(run.memory_hooks),
    )


@dataclass(frozen=True)
class Timing:
    """Seconds of an action that was repeated."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return sorted(self.seconds)[len(self.seconds) // 2]

    @property
    def spread_percent(self) -> float:
        """What the slowest took longer than the fastest, as a share of the median."""
        return 100 * (max(self.seconds) - min(self.seconds)) / self.median


def timing(run: Run, action: Callable[[], object], repeats: int) -> Timing:
    """Times of an action, waiting for the device. Where `train.gc_interval` is longer, the last has a search for
    garbage, so that it does not look free."""
    seconds = []
    with collected_every(min(run.config.train.gc_interval, repeats)) as collect:
        for number in range(repeats):
            wait(run.platform.device)
            began = time.perf_counter()
            action()
            collect(number + 1)
            wait(run.platform.device)
            seconds.append(time.perf_counter() - began)
    return Timing(tuple(seconds))


def speed_rows(case: str, tokens: int, *, step: Timing, forward_backward: Timing) -> list[Row]:
    """Speeds of whole steps of so many tokens and of their forward and backward alone, each with its spread."""
    return [
        Row(case, "tokens_per_s", tokens / forward_backward.median, "tokens/s"),
        Row(case, "tokens_per_s_spread_percent", forward_backward.spread_percent, "% of the median time"),
        Row(case, "tokens_per_s_with_optimizer", tokens / step.median, "tokens/s"),
        Row(case, "step_ms", step.median * 1e3, "ms"),
        Row(case, "step_ms_spread_percent", step.spread_percent, "% of the median"),
    ]


def median_seconds(run: Run, action: Callable[[], object], repeats: int) -> float:
    """Median seconds of an action, waiting for the device."""
    return timing(run, action, repeats).median


def trace(run: Run, action: Callable[[], object]) -> list[Span]:
    """What ran on this rank's GPU during an action, in the order in which it began. A collective call: the ranks start
    together, so that none waits for another's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        torch.distributed.barrier()
        wait(run.platform.device)
        action()
        wait(run.platform.device)
    spans = [
        Span(event.name, event.device_resource_id, event.time_range.start, event.time_range.end)
        for event in found.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return sorted(spans, key=lambda span: span.begin)


def covered_ms(spans: Iterable[Span]) -> float:
    """Milliseconds in which at least one of the spans, which come in the order of their begin, runs."""
    covered, reached = 0.0, float("-inf")
    for span in spans:
        covered += max(0.0, span.end - max(span.begin, reached))
        reached = max(reached, span.end)
    return covered / 1e3


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
