"""Memory-health metrics per layer, measured outside the hot path of forward.

On a due step, hooks keep a copy of the input of each memory layer for the first micro-batch; after the step they are
gone, and the metrics are computed from those copies, averaged over the ranks that saw other tokens, and gathered over
the pipeline stages. On all other steps nothing is hooked.

Legend: T tokens of one micro-batch on this rank, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ultramem.memory.base import MemoryLayer
from megatron_ultramem.memory.health import memory_health


class MemoryHealthProbe:
    """Captures inputs of the memory layers of this rank's model chunks, and turns them into metrics.

    with probe.watch(due):
        run the forward and backward passes of one step
    if due:
        metrics = probe.collect(data_groups=[...], pipeline_group=...)
    """

    def __init__(self, model_chunks: Sequence[nn.Module]) -> None:
        found = (module for chunk in model_chunks for module in chunk.modules() if isinstance(module, MemoryLayer))
        self._layers: dict[int, MemoryLayer] = {module.layer: module for module in found}
        self._inputs: dict[int, Tensor] = {}

    @contextmanager
    def watch(self, due: bool = True) -> Iterator[None]:
        """Within it, the first call of each memory layer leaves a copy of its input; later micro-batches and the
        second call under activation recompute do not. Does nothing when not `due`."""
        self._inputs = {}
        handles = [
            layer.register_forward_pre_hook(self._capture(number), with_kwargs=True)
            for number, layer in (self._layers.items() if due else ())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _capture(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if number not in self._inputs:
                x = args[0] if args else next(iter(kwargs.values()))
                # A copy, because recompute of the norm before the layer frees the storage of its input.
                self._inputs[number] = x.detach().clone()

        return hook

    def collect(
        self,
        *,
        data_groups: Sequence[dist.ProcessGroup | None] = (),
        pipeline_group: dist.ProcessGroup | None = None,
    ) -> dict[str, float]:
        """Metrics `memory/layer_03/<name>` of all layers of the model, the same on every rank. A collective call.

        data_groups: the metrics are averaged over each of these groups in turn (the data-parallel group, and the
        tensor-parallel group under sequence parallelism); their ranks hold the same layers. pipeline_group: the ranks
        that hold the other layers. None, or a group of one, needs no communication.

        Computed with the weights as they are at the call, from the tokens of one micro-batch per rank: averaged over
        ranks, `rows_touched` stays the share that one rank's micro-batch touches. Raises RuntimeError when a memory
        layer did not run within `watch`.
        """
        missing = sorted(self._layers.keys() - self._inputs.keys())
        if missing:
            raise RuntimeError(f"memory layers {missing} saw no tokens within watch(): nothing to measure")
        names, values = [], []
        for number in sorted(self._layers):
            layer, captured = self._layers[number], self._inputs.pop(number)
            for name, value in sorted(self._measure(layer, captured).items()):
                for suffix, element in _elements(value):
                    names.append(f"memory/layer_{number:02d}/{name}{suffix}")
                    values.append(element)
        local: dict[str, float] = {}
        if values:
            mean = torch.stack(values)
            for group in data_groups:
                if group is not None and group.size() > 1:
                    dist.all_reduce(mean, group=group)
                    mean /= group.size()
            local = dict(zip(names, mean.tolist(), strict=True))
        return _gather(local, pipeline_group)

    @staticmethod
    @torch.no_grad()
    def _measure(layer: MemoryLayer, captured: Tensor) -> dict[str, Tensor]:
        x_TH = captured.reshape(-1, captured.shape[-1])
        return memory_health(layer, x_TH)


def _elements(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The elements of a metric in fp32: itself for one element, else numbered `_0`, `_1`, ... in order."""
    flat = value.detach().float().reshape(-1)
    for index, element in enumerate(flat.unbind()):
        yield ("" if flat.numel() == 1 else f"_{index}"), element


def _gather(local: dict[str, float], group: dist.ProcessGroup | None) -> dict[str, float]:
    """The union over the ranks of `group`, in the order of names (so of layers)."""
    if group is None or group.size() == 1:
        return local
    parts: list[dict[str, float]] = [{} for _ in range(group.size())]
    dist.all_gather_object(parts, local, group=group)
    merged = {name: value for part in parts for name, value in part.items()}
    return {name: merged[name] for name in sorted(merged)}
