"""Memory layers as CUDA graphs: one launch for a forward and one for a backward, instead of dozens of small ones.

A memory layer's kernels are short, so that a host which launches them one by one is slower than the GPU that runs them.
Graphs are recorded once, after a first step in which kernels were compiled and communicators made, and replayed in
every micro-batch of a training step: all forwards in the order of the layers, then all backwards in reverse. The graphs
of all layers share one memory pool on the strength of this order, which is why there is no pipeline parallelism here.

A backward adds the parameters' gradients to `main_grad` itself; autograd and DDP's hooks see the layer's input and
output alone, so DDP is told by `gradients_ready`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_ultramem.memory.base import MemoryLayer
from megatron_ultramem.model.feed_forward import FIRST
from megatron_ultramem.training.graph_recording import Counted, add_gradients, leaves_of, recording, remember


class MemoryGraphs:
    """The graphs of the memory layers of one model chunk.

    Args:
        layers: in the order in which they run.
        gradients_ready: called with the parameters of a layer (not the tables') after each of its backwards.

    Attributes:
        recorded: whether the layers run as graphs.
    """

    def __init__(self, layers: Sequence[MemoryLayer], gradients_ready: Callable[[list[nn.Parameter]], None]) -> None:
        self._graphs = [_LayerGraph(layer, gradients_ready) for layer in layers]
        for graph in self._graphs:
            graph.layer.graph = graph
        self.recorded = False

    def begin_step(self) -> None:
        """Records the graphs once every layer has run without them."""
        if self.recorded or any(graph.shape is None for graph in self._graphs):
            return
        stream, pool = torch.cuda.Stream(priority=FIRST), torch.cuda.graph_pool_handle()
        for graph in self._graphs:
            graph.record_forward(stream, pool)
        for graph in reversed(self._graphs):
            graph.record_backward(stream, pool)
        self.recorded = True
        remember(self)

    def release(self) -> None:
        """Gives the graphs back; the layers run without."""
        for graph in self._graphs:
            graph.layer.graph = None
        self._graphs, self.recorded = [], False


class _LayerGraph:
    """Forward and backward of one layer for inputs of one shape."""

    def __init__(self, layer: MemoryLayer, gradients_ready: Callable[[list[nn.Parameter]], None]) -> None:
        self.layer, self._gradients_ready = layer, gradients_ready
        self.shape: torch.Size | None = None  # of the inputs, once one was seen
        self._params = {name: param for name, param in layer.named_parameters() if param.requires_grad}
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._recorded = False

    def takes(self, x: Tensor) -> bool:
        """Whether `run` may stand in for the layer on this input: in training, unless somebody watches the layer."""
        if not (self.layer.training and torch.is_grad_enabled() and x.requires_grad):
            return False
        if not self._recorded:
            self.shape, self._dtype = x.shape, x.dtype
            return False
        return x.shape == self.shape and not self.layer._forward_pre_hooks and not self.layer._forward_hooks

    def run(self, x: Tensor) -> Tensor:
        """The layer's output; in memory that the next call overwrites."""
        output: Tensor = _Replay.apply(x, self)
        return output

    def record_forward(self, stream: torch.cuda.Stream, pool: Any) -> None:
        assert self.shape is not None
        device = self.layer.table.values.device
        self._input = torch.zeros(self.shape, dtype=self._dtype, device=device, requires_grad=True)
        self._leaves = leaves_of(self._params)
        with Counted([self.layer.table]) as self._forward_traffic, self._into(self._forward, stream, pool):
            self._output = torch.func.functional_call(self.layer, self._leaves, (self._input,))

    def record_backward(self, stream: torch.cuda.Stream, pool: Any) -> None:
        self._grad_output = torch.zeros_like(self._output)
        inputs = [self._input, *self._leaves.values()]
        with Counted([self.layer.table]) as self._backward_traffic, self._into(self._backward, stream, pool):
            self._grad_input, *grads = torch.autograd.grad(self._output, inputs, self._grad_output)
            add_gradients(self._leaves, grads)
        self._output, self._leaves = self._output.detach(), {}  # what the forward saved is the graphs' now
        self._recorded = True

    def replay_forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self._input.copy_(x)
        self._forward.replay()
        self._forward_traffic.repeat()
        return self._output.detach()

    def replay_backward(self, grad_output: Tensor) -> Tensor:
        self._grad_output.copy_(grad_output)
        self._backward.replay()
        self._backward_traffic.repeat()
        self._gradients_ready(list(self._params.values()))
        self.layer.table.count_backward()
        return self._grad_input.detach()

    def _into(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any) -> AbstractContextManager[None]:
        return recording(graph, stream, pool, f"memory layer {self.layer.layer}")


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, graph: _LayerGraph) -> Tensor:
        ctx.graph = graph
        return graph.replay_forward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return ctx.graph.replay_backward(grad_output), None
