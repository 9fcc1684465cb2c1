"""The value pools of one pipeline stage as a Megatron module: process-group attributes and checkpoint sharding."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule

from megatron_ultramem.memory.shards import TableShard
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
        """Tables by the number of their pool, whatever the placement: any other can load them."""
        state: ShardedStateDict = {}
        for pool in self.children():
            assert isinstance(pool, ValuePool)
            for name, shard in pool.shards.items():
                key = f"{prefix}{pool.pool.index}.{name}"
                state[key] = sharded_table(
                    key, getattr(pool, name), shard, sharded_offsets, replica_id=(0, 0, self._replica)
                )
        return state


def sharded_table(
    key: str,
    table: torch.Tensor,
    shard: TableShard,
    sharded_offsets: tuple[Any, ...] = (),
    *,
    replica_id: tuple[int, int, int],
) -> ShardedTensor | ShardedTensorFactory:
    """A rank's shard of a table as Megatron's checkpoints take it; a factory where it is not one block of rows."""
    prepended = len(sharded_offsets)

    def block(key: str, rows: torch.Tensor, row_start: int, replica_id: Any) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(
            key,
            rows,
            *sharded_offsets,
            (prepended, row_start // shard.block_rows, shard.rows // shard.block_rows),
            (prepended + 1, shard.column_start // shard.columns, shard.width // shard.columns),
            replica_id=replica_id,
            prepend_axis_num=prepended,
        )

    if len(shard.row_starts) == 1:
        return block(key, table, shard.row_starts[0], replica_id)

    def build(key: str, tensor: torch.Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        assert flattened_range is None  # only in formats of optimizer state that cannot be resharded
        return [block(key, tensor[rows], start, replica_id) for rows, (start, _) in shard.pieces()]

    return ShardedTensorFactory(key, table, build, torch.cat, replica_id)
