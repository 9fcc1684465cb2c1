"""The job of the planner's tests: what ranks of a real run hold and receive, and what the planner says of both."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ultramem.config import load_config
from megatron_ultramem.model.build import value_pools
from megatron_ultramem.planning.clusters import load_cluster
from megatron_ultramem.planning.communication import Links, step_traffic
from megatron_ultramem.planning.layout import layout_of, rank_parameters
from megatron_ultramem.planning.memory import stage_memory
from megatron_ultramem.planning.activations import Options
from megatron_ultramem.planning.workload import Workload
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.setup import Run, set_up


class Collectives(TorchDispatchMode):
    """Bytes that this rank receives from others in every collective, by the ranks of its group."""

    def __init__(self) -> None:
        super().__init__()
        self.received: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("c10d.").split(".")[0]
        if str(func).startswith("c10d.") and name in _VOLUMES:
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject)
                         and "ProcessGroup" in str(arg._type()))  # fmt: skip
            ranks = tuple(dist.get_process_group_ranks(group))
            self.received[ranks] += _VOLUMES[name](args, len(ranks))
        return func(*args, **(kwargs or {}))


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes
    return sum(_bytes(tensor) for tensor in tensors)


# Op -> bytes received, of a ring, from its arguments and the size of the group.
_VOLUMES = {
    "allreduce_": lambda args, n: 2 * (n - 1) / n * _bytes(args[0]),
    "_allgather_base_": lambda args, n: (n - 1) / n * _bytes(args[0]),
    "_reduce_scatter_base_": lambda args, n: (n - 1) / n * _bytes(args[1]),
    "alltoall_base_": lambda args, n: 0,  # counted by the exchange itself
    "recv_": lambda args, n: _bytes(args[0]),
}
