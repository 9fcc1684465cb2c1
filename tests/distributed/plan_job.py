"""The jobs of the planner's tests: what ranks of a real run hold and receive, and what the planner says of both."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ultramem.config import load_config
from megatron_ultramem.model.build import value_pools
from megatron_ultramem.parallel.placement import ShardedPlacement
from megatron_ultramem.planning.clusters import load_cluster
from megatron_ultramem.planning.communication import Links, step_traffic
from megatron_ultramem.planning.layout import Layout, layout_of, rank_parameters
from megatron_ultramem.planning.workload import Stage, Workload
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.setup import Run, set_up

Received = dict[tuple[int, ...], float]


class Collectives(TorchDispatchMode):
    """Bytes that this rank receives from others, by the ranks of the group."""

    def __init__(self) -> None:
        super().__init__()
        self.received: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = str(func).split(".")
        if operation[0] == "c10d" and operation[1] in _VOLUMES:
            group = group_among(args)
            assert group is not None
            ranks = dist.get_process_group_ranks(group)
            self.received[tuple(ranks)] += _VOLUMES[operation[1]](args, len(ranks), group.rank())
        return func(*args, **(kwargs or {}))


def group_among(args: Any) -> dist.ProcessGroup | None:
    """The process group among the arguments of an operation of torch's dispatcher."""
    boxed = (arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
    return next((dist.ProcessGroup.unbox(arg) for arg in boxed), None)


def _bytes(tensors: Any) -> int:
    return tensors.nbytes if isinstance(tensors, torch.Tensor) else sum(_bytes(tensor) for tensor in tensors)


def _of_all_to_all(args: Any, ranks: int, rank: int) -> float:
    output, _, _, splits, *_ = args
    return _bytes(output) * (1 - splits[rank] / sum(splits) if splits else (ranks - 1) / ranks)


# Operation -> bytes received, by a ring where it is one, from its arguments and the size of the group.
_VOLUMES = {
    "allreduce_": lambda args, n, rank: 2 * (n - 1) / n * _bytes(args[0]),
    "allreduce_coalesced_": lambda args, n, rank: 2 * (n - 1) / n * _bytes(args[0]),
    "_allgather_base_": lambda args, n, rank: (n - 1) / n * _bytes(args[0]),
    "allgather_into_tensor_coalesced_": lambda args, n, rank: (n - 1) / n * _bytes(args[0]),
    "_reduce_scatter_base_": lambda args, n, rank: (n - 1) / n * _bytes(args[1]),
    "reduce_scatter_tensor_coalesced_": lambda args, n, rank: (n - 1) / n * _bytes(args[1]),
    "alltoall_base_": _of_all_to_all,
    "recv_": lambda args, n, rank: _bytes(args[0]),
}


def held_and_received(overrides: list[str]) -> dict[str, Any]:
    """Of a run's second step on this rank: parameters, gradient and optimizer bytes, traffic; measured and planned."""
    run = set_up(load_config(None, overrides))
    train_step(run)
    counters = {id(pool.placement): pool.placement.traffic for pool in value_pools(run.model)
                if isinstance(pool.placement, ShardedPlacement)}  # fmt: skip
    before = sum(sum(traffic.received.values()) for traffic in counters.values())
    with Collectives() as collectives:
        train_step(run)
    counted = sum(sum(traffic.received.values()) for traffic in counters.values()) - before

    config = run.config
    work = Workload(config.model, run.checkpoints.vocab_size, config.data.sequence_length)
    layout = layout_of(config, dist.get_world_size())
    stage = work.stages(config)[parallel_state.get_pipeline_model_parallel_rank()]
    traffic = step_traffic(config, work, layout, Links(load_cluster("h100"), layout), stage)
    planned: Counter[tuple[int, ...]] = Counter()
    for name, moved in traffic.items():
        planned[tuple(dist.get_process_group_ranks(_group(name)))] += moved.received
    return {
        "parameters": (sum(p.numel() for chunk in run.model for p in chunk.parameters()),
                       rank_parameters(work, layout, stage).total),
        "state": (_state_bytes(run), _planned_state(work, layout, stage)),
        "received": (dict(collectives.received), {ranks: moved for ranks, moved in planned.items() if moved}),
        "pipeline": tuple(dist.get_process_group_ranks(_group("pipeline"))),
        "exchange": (counted, traffic["memory"].received),
    }  # fmt: skip


def _group(name: str) -> dist.ProcessGroup:
    return {
        "tensor": parallel_state.get_tensor_model_parallel_group,
        "pipeline": parallel_state.get_pipeline_model_parallel_group,
        "context": parallel_state.get_context_parallel_group,
        "expert": parallel_state.get_expert_model_parallel_group,
        "memory": parallel_state.get_expert_model_parallel_group,
        "row_scales": parallel_state.get_expert_model_parallel_group,
        "data": lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),
        "expert_data": parallel_state.get_expert_data_parallel_group,
        "embedding": lambda: parallel_state.get_embedding_group(check_initialized=False),
    }[name]()


def _state_bytes(run: Run) -> int:
    """Gradient buffers, and what the optimizer keeps in fp32."""
    buffers = [buffer for chunk in run.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    state = sum(
        tensor.nbytes
        for optimizer in run.optimizer.chained_optimizers
        for of_parameter in optimizer.optimizer.state.values()
        for tensor in of_parameter.values()
        if torch.is_tensor(tensor) and tensor.numel() > 1
    )
    return sum(buffer.grad_data.nbytes for buffer in buffers) + state


def _planned_state(work: Workload, layout: Layout, stage: Stage) -> float:
    from megatron_ultramem.planning.activations import Options
    from megatron_ultramem.planning.memory import stage_memory

    options = Options("local", False, layout.element, work.sequence_length, "none", False)
    memory = stage_memory(work, layout, stage, options)
    return memory.gradients + memory.table_gradients + memory.optimizer + memory.table_optimizer
