"""A micro-batch's forward through the whole model as one CUDA graph, and its backward as another.

Between them stay the loss (masked, and scaled by the number of micro-batches) and Megatron's schedule; after the last
one the gradients are reduced as without graphs. So the graphs serve any number of micro-batches, and the host makes
some thirty launches for each instead of thousands.

A graph replays addresses. These stay: parameters and `main_grad` (DDP's buffers), buffers of the model, the scale of
the auxiliary losses, and the static inputs and outputs here. The model is recorded with leaves of its own in place of
its parameters, because DDP ties the parameters' gradient nodes to the stream that it was built on; the backward adds
what it finds there to `main_grad`. Value tables take their gradients there anyway.

Graphs are recorded after one step without: kernels are then compiled, plans made, communicators open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ultramem.memory.base import MemoryLayer
from megatron_ultramem.memory.tables import ValuePool
from megatron_ultramem.model.fp8 import StepWeights
from megatron_ultramem.training.graph_recording import Counted, add_gradients, leaves_of, recording, remember


class ModelGraph:
    """The two graphs of a model.

    Args:
        model: takes `input_ids`, `position_ids`, `labels` [b, s] and `attention_mask` None; gives losses [b, s].
        layers, pools: its memory layers and value pools.
        fp8: its linears compute in FP8; their weights are made FP8 in a step's first micro-batch alone.

    Attributes:
        recorded: whether micro-batches run as graphs.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[MemoryLayer], pools: Sequence[ValuePool], *, fp8: bool = False
    ) -> None:
        self._model, self._layers, self._pools, self._fp8 = model, layers, pools, fp8
        self._params = {
            name: param
            for name, param in model.named_parameters()
            if param.requires_grad and not getattr(param, "is_value_table", False)
        }
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._inputs: dict[str, Tensor] = {}  # static, once a micro-batch was seen
        self._shown = self._released = False
        self._weights: StepWeights | None = None
        self.recorded = False

    def begin_step(self) -> None:
        """Records the graphs once a micro-batch has run without them."""
        self._shown, self._first = False, True
        if self.recorded or not self._inputs:
            return
        self._settle()
        self._weights = StepWeights(self._model) if self._fp8 else None
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._record_forward(stream, pool)
        self._record_backward(stream, pool)
        self.recorded = True
        remember(self)

    def release(self) -> None:
        """Gives the graphs back; the model runs without."""
        self._forward.reset()
        self._backward.reset()
        self._inputs, self._weights, self.recorded, self._released = {}, None, False, True

    def takes(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether `run` may stand in for the model on this micro-batch; without graphs, remembers what it is like."""
        if not (self._model.training and torch.is_grad_enabled()):
            return False
        if not self._inputs and not self._released:
            self._inputs = {name: torch.zeros_like(value) for name, value in inputs.items()}
        return self.recorded and all(
            value.shape == self._inputs[name].shape and value.dtype == self._inputs[name].dtype
            for name, value in inputs.items()
        )

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Losses [b, s]; in memory that the next call overwrites."""
        self._settle()
        if not self._shown and any(layer._forward_pre_hooks or layer._forward_hooks for layer in self._layers):
            self._show(inputs)
        losses_BS: Tensor = _Replay.apply(self._anchor, self, inputs)
        return losses_BS

    def _settle(self) -> None:
        """Waits for updates of the tables by the host, which a replay would not see."""
        for pool in self._pools:
            pool.settle()

    def _show(self, inputs: Mapping[str, Tensor]) -> None:
        """Whoever watches memory layers sees the first micro-batch of the step in a forward that leaves no trace."""
        self._shown = True
        device = next(iter(inputs.values())).device
        with torch.no_grad(), torch.random.fork_rng([device]), Counted(self._pools):
            self._model(**inputs, attention_mask=None)

    def _record_forward(self, stream: torch.cuda.Stream, pool: Any) -> None:
        self._leaves = leaves_of(self._params)
        with (
            Counted(self._pools) as self._forward_traffic,
            recording(self._forward, stream, pool, "the model's forward"),
        ):
            self._output = torch.func.functional_call(
                self._model, self._leaves, (), {**self._inputs, "attention_mask": None}
            )

    def _record_backward(self, stream: torch.cuda.Stream, pool: Any) -> None:
        # Strides as the loss gives them, not those of the losses: with one sequence in a micro-batch they differ, and
        # what torch.compile made for the step without graphs would not do.
        self._grad_output = torch.zeros(self._output.shape, dtype=self._output.dtype, device=self._output.device)
        with (
            Counted(self._pools) as self._backward_traffic,
            recording(self._backward, stream, pool, "the model's backward"),
        ):
            leaves = list(self._leaves.values())
            grads = torch.autograd.grad(self._output, leaves, self._grad_output, allow_unused=True)
            add_gradients(self._leaves, grads)
        self._output, self._leaves = self._output.detach(), {}  # what the forward saved is the graphs' now
        self._anchor = torch.zeros((), device=self._output.device, requires_grad=True)

    def replay_forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        for name, value in inputs.items():
            self._inputs[name].copy_(value)
        if self._weights is not None:
            self._weights.make(self._first)
        self._first = False
        self._forward.replay()
        self._forward_traffic.repeat()
        return self._output.detach()

    def replay_backward(self, grad_losses_BS: Tensor) -> None:
        self._grad_output.copy_(grad_losses_BS)
        self._backward.replay()
        self._backward_traffic.repeat()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graph: ModelGraph, inputs: Mapping[str, Tensor]) -> Tensor:
        ctx.graph = graph
        return graph.replay_forward(inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_losses_BS: Tensor) -> tuple[None, None, None]:
        ctx.graph.replay_backward(grad_losses_BS)
        return None, None, None
