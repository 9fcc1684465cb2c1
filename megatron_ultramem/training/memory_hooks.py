"""What Megatron's DDP and memory layers must tell each other.

DDP learns from autograd when a gradient is ready, and from module calls when a gathered parameter is needed. Neither
works for value tables: autograd never sees their gradient (it would be a dense tensor of the table's size), and layers
use a table without calling the module that owns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel

from megatron_ultramem.config.schema import Config
from megatron_ultramem.memory.base import MemoryLayer
from megatron_ultramem.memory.tucker_layer import refresh_layers
from megatron_ultramem.model.build import memory_layers, value_pools
from megatron_ultramem.training.layer_graphs import LayerGraphs
from megatron_ultramem.training.memory_graphs import MemoryGraphs
from megatron_ultramem.training.model_graph import ModelGraph


class MemoryHooks:
    """Connects the memory layers and pools of one model chunk with the chunk's DDP.

    config: `train.cuda_graphs` memory: the layers run as CUDA graphs from the second step on; full: the whole chunk;
    layers: its transformer layers, as far as Megatron records them; or none.
    """

    def __init__(self, ddp: DistributedDataParallel, chunk: GPTModel, config: Config) -> None:
        self.ddp = ddp
        self.layers = memory_layers([chunk])
        self.pools = value_pools([chunk])
        self._stale: set[int] = set()
        for pool in self.pools:
            pool.grad_ready = self._grad_ready
        if ddp.ddp_config.overlap_param_gather:
            for layer in self.layers:
                layer.register_forward_pre_hook(self._before_forward)
        self.graphs: MemoryGraphs | ModelGraph | LayerGraphs | None = None
        cuda_graphs = config.train.cuda_graphs
        if cuda_graphs == "memory":
            self.graphs = MemoryGraphs(self.layers, self._gradients_ready)
        elif cuda_graphs == "full":
            fp8 = config.train.fp8.recipe != "none"
            self.graphs = ModelGraph(ddp.module, self.layers, self.pools, fp8=fp8)
        elif cuda_graphs == "layers":
            self.graphs = LayerGraphs(ddp, config.data.sequence_length, config.train.micro_batch_size)

    def begin_step(self) -> None:
        """Recomputes what the layers derive from their parameters once per optimizer step.

        While parameters are still being gathered a layer does so when it is first called, not to wait for all of them
        here.
        """
        for pool in self.pools:
            pool.reset_grad_count()  # of a step that an error ended
        if self.graphs is not None:
            for pool in self.pools:
                pool.refresh()  # not to be recorded, and not called by what is replayed
            self.graphs.begin_step()  # first: what is recorded must not be kept as if it had been computed
        for layer in self.layers:
            layer.begin_step()
        if self.ddp.ddp_config.overlap_param_gather:
            self._stale = {layer.layer for layer in self.layers}
        else:
            refresh_layers(self.layers)

    def end_step(self) -> None:
        """Lets the layers take up what the micro-batches left. A collective call."""
        for pool in self.pools:
            pool.outdate()
        for layer in self.layers:
            layer.end_step()

    def forget_step(self) -> None:
        """Lets the layers drop what the micro-batches left."""
        for layer in self.layers:
            layer.forget_step()

    def _gradients_ready(self, params: Sequence[torch.nn.Parameter]) -> None:
        for param in params:
            self._grad_ready(param)

    def _grad_ready(self, param: torch.nn.Parameter) -> None:
        """The gradient of a table, or of a parameter that autograd does not see, is complete in main_grad."""
        if self.ddp.ddp_config.overlap_grad_reduce:
            if param.is_cuda:
                _join_streams(param.device)
            self.ddp.param_to_bucket_group[param].register_grad_ready(param, self.ddp.force_all_reduce)

    def _before_forward(self, layer: MemoryLayer, _: Any) -> None:
        # Outside training steps (evaluation, saving) parameters are whole and DDP's own hooks are off.
        if self.ddp.remove_forward_pre_hook_handles:
            for module in (layer.retrieval, layer.table):
                for param in module.parameters(recurse=False):
                    self.ddp.param_to_bucket_group[param].finish_param_sync()
            if layer.layer in self._stale:
                self._stale.remove(layer.layer)
                layer.refresh()


def model_graph(hooks: Sequence[MemoryHooks]) -> ModelGraph | None:
    """What stands in for the model of this rank, where something does; there is one chunk then."""
    graphs = hooks[0].graphs
    return graphs if isinstance(graphs, ModelGraph) else None


def begin_step(hooks: Sequence[MemoryHooks]) -> None:
    """`MemoryHooks.begin_step` for every chunk of a rank."""
    for chunk in hooks:
        chunk.begin_step()


def end_step(hooks: Sequence[MemoryHooks]) -> None:
    """`MemoryHooks.end_step` for every chunk of a rank."""
    for chunk in hooks:
        chunk.end_step()


def forget_step(hooks: Sequence[MemoryHooks]) -> None:
    """`MemoryHooks.forget_step` for every chunk of a rank."""
    for chunk in hooks:
        chunk.forget_step()


def _join_streams(device: torch.device) -> None:
    """With parallel.overlap_exchange, gradients of one bucket come from two streams, and its reduction may start on
    either: each waits for what the other has been given so far."""
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    if current != default:
        current.wait_stream(default)
        default.wait_stream(current)
