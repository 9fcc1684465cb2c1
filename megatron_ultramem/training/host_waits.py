"""Finds where the host waits for the GPU, from a trace of torch's profiler."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.profiler import record_function

from megatron_ultramem.training.measure import passes, ready
from megatron_ultramem.training.setup import Run
from megatron_ultramem.training.time_split import traced

_RANGE = "looked at for waits"
_CALLS = (
    "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy",
    "cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize",
)  # fmt: skip
_DEPTH = 8  # operations named around a wait


def host_waits(run: Run) -> Counter[str]:
    """The waits of this rank's host for its GPU in the forward and backward of two micro-batches: what waited, within
    which operations, how often. Copies between the GPU and memory that is not page-locked count, because the driver may
    wait in them. A collective call."""
    ready(run)

    def within_range() -> None:
        with record_function(_RANGE):
            passes(run, 2)

    events = traced(run, within_range)
    whole = next(event.time_range for event in events if event.name == _RANGE and not _on_gpu(event))
    found: Counter[str] = Counter()
    for event in events:
        if _on_gpu(event):
            if "Pageable" in event.name:
                found[event.name] += 1
        elif event.name in _CALLS and whole.start <= event.time_range.start <= whole.end:
            found[f"{event.name} in {_around(event)}"] += 1
    return found


def _on_gpu(event: Any) -> bool:
    return bool(event.device_type == torch.autograd.DeviceType.CUDA)


def _around(event: Any) -> str:
    names: list[str] = []
    parent = event.cpu_parent
    while parent is not None and parent.name != _RANGE and len(names) < _DEPTH:
        names.append(parent.name)
        parent = parent.cpu_parent
    return " < ".join(names) or "no operation"
