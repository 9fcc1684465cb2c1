"""Recording CUDA graphs: what graphs of memory layers and of whole models share."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_ultramem.errors import TrainingError
from megatron_ultramem.memory.tables import ValuePool
from megatron_ultramem.parallel.traffic import Traffic


class Graphs(Protocol):
    """Whatever holds recorded graphs."""

    def release(self) -> None:
        """Gives the graphs back; what they stood for runs without."""


_recorded: weakref.WeakSet[Graphs] = weakref.WeakSet()


def remember(graphs: Graphs) -> None:
    """Lets `release_all` find graphs that were recorded."""
    _recorded.add(graphs)


def release_all() -> None:
    """`release` for all graphs of the process. NCCL cannot end a communicator that a graph still refers to."""
    for graphs in list(_recorded):
        graphs.release()
    _recorded.clear()


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any, what: str) -> Iterator[None]:
    """Within it, what is launched is recorded instead of run. What torch.compile has not compiled before runs as plain
    PyTorch: a kernel that is tuned waits for the device.

    Raises TrainingError that names `what` and the line of code whose operation cannot be recorded.
    """
    try:
        # Of this thread alone: NCCL's watchdog asks for events of earlier collectives meanwhile.
        with (
            torch.compiler.set_stance("eager_on_recompile"),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            yield
    except Exception as error:
        raise TrainingError(
            f"{what} cannot be recorded as a CUDA graph: {_where(error)}; legal: train.cuda_graphs = none"
        ) from error


def _where(error: BaseException) -> str:
    """The first error, and the line that it came from: ending a recording that failed raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    return f"{str(error).splitlines()[0] if str(error) else type(error).__name__}{place}"


def leaves_of(params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The parameters' memory as other leaves, with what Megatron and Transformer Engine ask of a parameter. DDP keeps
    the parameters' own gradient nodes tied to the stream that it was made on, which records nothing."""
    leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
    for name, param in params.items():
        vars(leaves[name]).update(vars(param))
        leaves[name].grad_added_to_main_grad = False  # type: ignore[attr-defined]
    return leaves


def add_gradients(leaves: Mapping[str, Tensor], grads: Iterable[Tensor | None]) -> None:
    """Adds gradients of `leaves_of` parameters to their `main_grad`, as DDP's hooks would; raises RuntimeError where
    there is none, or a parameter would silently stay as it is."""
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        if grad is None:
            raise RuntimeError(f"no gradient reaches {name}")
        if not leaf.grad_added_to_main_grad:  # type: ignore[attr-defined]  # Transformer Engine may have done it
            leaf.main_grad.add_(grad)  # type: ignore[attr-defined]


class Counted:
    """What the exchanges of pools were counted to move while they were only recorded: taken back at the end, and added
    by every `repeat`. Their time is not measured: an event within a graph cannot be read."""

    def __init__(self, tables: Iterable[ValuePool]) -> None:
        found = (getattr(table.placement, "traffic", None) for table in tables)
        self._traffics: list[Traffic] = list(
            {id(traffic): traffic for traffic in found if traffic is not None}.values()
        )

    def __enter__(self) -> Counted:
        self._before = [(traffic.copy(), traffic.timed) for traffic in self._traffics]
        for traffic in self._traffics:
            traffic.timed = nullcontext
        return self

    def __exit__(self, *_: Any) -> None:
        self._differences = []
        for traffic, (before, timed) in zip(self._traffics, self._before, strict=True):
            traffic.timed = timed
            self._differences.append(traffic - before)
            traffic.set(before)

    def repeat(self) -> None:
        """Counts what a replay moves."""
        for traffic, difference in zip(self._traffics, self._differences, strict=True):
            traffic += difference
