"""Where the GPU's time of a training step goes, by component, from a trace of torch's profiler.

A kernel belongs to the innermost marked range in which the host launched it. Modules are marked in the forward by hooks
and in the backward by autograd nodes at their output and their input: the engine runs nodes in the reverse order of
the forward, so that everything between the two is the module's. A replayed CUDA graph has no launches to tell apart:
the step that is traced must run without graphs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_ultramem.model.feed_forward import FeedForwardWithMemory
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.measure import forward_backward_only, trace, wait
from megatron_ultramem.training.setup import Run
from megatron_ultramem.training.spans import EXCHANGE, GRAD_SYNC

_PART = "part: "
# `memory`: what a memory layer does beside its search and its lookup; `other`: embedding, head, loss, norms, residuals.
COMPONENTS = ("attention", "ffn", "retrieval", "lookup", "exchange", "memory", "grad_sync", "optimizer", "other")
_RANGES = {
    **{_PART + name: name for name in ("attention", "ffn", "memory")},
    **{name: name for name in (EXCHANGE, GRAD_SYNC)},
    "_Search": "retrieval", "_SearchBackward": "retrieval", "_Lookup": "lookup", "_LookupBackward": "lookup",
}  # fmt: skip


def time_split(run: Run) -> dict[str, float]:
    """Milliseconds of kernels on this rank's GPU by component: of the forward and backward of a micro-batch, and what a
    step adds to them (`optimizer`). Kernels on several streams at the same time count each. A collective call."""
    with marked(run):
        events = traced(run, lambda: forward_backward_only(run, 1))
    milliseconds = dict.fromkeys(COMPONENTS, 0.0)
    total = sum(event.time_range.elapsed_us() for event in events if _is_kernel(event)) / 1e3
    for event, component in by_component(events):
        # A range has its own shadow on the GPU among its kernels.
        spent = sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)
        milliseconds[component] += spent / 1e3
    milliseconds["other"] += max(0.0, total - sum(milliseconds.values()))  # what no operation of torch launched
    # Transformer Engine's Adam is no operation of torch, so its kernels have no range.
    milliseconds["optimizer"] = max(0.0, _kernel_ms(run, train_step) - total)
    return milliseconds


def _kernel_ms(run: Run, action: Callable[[Run], object]) -> float:
    return sum(span.end - span.begin for span in trace(run, lambda: action(run))) / 1e3


def by_component(events: Iterable[Any]) -> Iterator[tuple[Any, str]]:
    """The events on the host, each with the component in whose range it began."""
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    ranges: dict[int, list[tuple[float, float, str]]] = defaultdict(list)
    for event in on_host:
        if component := _RANGES.get(event.name):
            ranges[event.thread].append((event.time_range.start, event.time_range.end, component))
    for event in on_host:
        yield event, _innermost(ranges[event.thread], event.time_range.start)


def traced(run: Run, action: Callable[[], object]) -> list[Any]:
    """The events of torch's profiler, on the host and on the GPU, of an action that this rank's run does."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if run.platform.is_cuda else [])]
    with profile(activities=activities) as found:
        action()
        wait(run.platform.device)
    return list(found.events() or ())


@contextmanager
def marked(run: Run) -> Iterator[None]:
    """Within it, attention, FFN and memory layers are ranges in a trace, and so are the spans of `run`."""
    handles = []
    for layer in (layer for chunk in run.model for layer in chunk.decoder.layers):
        parts = {"attention": layer.self_attention}
        if isinstance(layer.mlp, FeedForwardWithMemory):
            parts |= {"ffn": layer.mlp.ffn, "memory": layer.mlp.memory}
        else:
            parts["ffn"] = layer.mlp
        for name, module in parts.items():
            if module is not None:
                handles += _mark(module, _PART + name)
    run.spans.annotate = True
    try:
        yield
    finally:
        run.spans.annotate = False
        for handle in handles:
            handle.remove()


def _mark(module: nn.Module, name: str) -> list[Any]:
    open_ranges: list[record_function] = []

    def enter() -> None:
        open_ranges.append(record_function(name))
        open_ranges[-1].__enter__()

    def leave() -> None:
        open_ranges.pop().__exit__(None, None, None)

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        enter()
        return (_InBackward.apply(args[0], leave), *args[1:])

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        first, *rest = output if isinstance(output, tuple) else (output,)
        first = _InBackward.apply(first, enter)
        leave()
        return (first, *rest) if isinstance(output, tuple) else first

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


class _InBackward(torch.autograd.Function):
    """The same tensor; calls something when its gradient comes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return grad, None


def _is_kernel(event: Any) -> bool:
    """Not the shadow that a range of the host casts on the GPU."""
    return event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation


def _innermost(ranges: list[tuple[float, float, str]], moment: float) -> str:
    begin, component = float("-inf"), "other"
    for low, high, name in ranges:
        if low <= moment <= high and low >= begin:
            begin, component = low, name
    return component
