"""The value pools of one pipeline stage as a Megatron module: process-group attributes and checkpoint sharding."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron_ultramem.memory.tables import ValuePool


class PoolBank(MegatronModule):
    """The pools whose layers live on this stage; hangs on the decoder, so that a checkpoint holds each pool once.

    Tables are expert parameters of Megatron (`allreduce=False`) whatever the layout is: they then live in the expert
    buffers, are reduced over the expert-data-parallel group alone, and the structure of the optimizer, and with it its
    checkpoint, never depends on the layout.
    """

    def __init__(self, config: Any, pools: list[ValuePool], pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        for pool in pools:
            self.add_module(str(pool.pool.index), pool)
        self._replica = torch.distributed.get_rank(pg_collection.expt_dp)
        for param in self.parameters():
            param.allreduce = False
            param.is_value_table = True  # a learning rate of its own
            # Otherwise the gradient norm counts the table on tensor-parallel rank 0 alone.
            tensor_parallel.set_tensor_model_parallel_attributes(param, True, 0, 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Replicated tables: one saved copy, keyed by the number of the pool."""
        return {
            prefix + name: ShardedTensor.from_rank_offsets(
                prefix + name,
                param,
                *sharded_offsets,
                replica_id=(0, 0, self._replica),
                prepend_axis_num=len(sharded_offsets),
            )
            for name, param in self.named_parameters()
        }
