"""Placements of the value pools over the memory-parallel group: who holds what, and how lookups get there.

A placement is a `memory.tables.Placement`: it says which shard of every table this rank holds and makes the lookup path
(indices, scores, pre-input -> pooled values) of each pool.

| placement | a rank holds | exchange |
|---|---|---|
| replicated (`WholeTables`) | everything | none |
| rows | all columns of 1/P of the rows | queries to owners, partial sums back |
| columns | 1/P of the columns of all rows | partial dots, weights and pooled slices |
| two_level | columns of a node's share, rows of 1/nodes | rows across nodes, columns within |
"""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ultramem.config.schema import Config, MemoryConfig
from megatron_ultramem.memory.geometry import Pool
from megatron_ultramem.memory.kinds import activation, blocks, num_cores
from megatron_ultramem.memory.lookup import LocalLookup, LookupPath, lookup_backend
from megatron_ultramem.memory.shards import TableShard
from megatron_ultramem.memory.tables import Placement, WholeTables
from megatron_ultramem.parallel.channel import Channel
from megatron_ultramem.parallel.cost_model import choose, tokens_per_rank
from megatron_ultramem.parallel.exchange_columns import ColumnsExchange
from megatron_ultramem.parallel.exchange_rows import RowsExchange
from megatron_ultramem.parallel.exchange_rows_to_all import RowsToAllExchange
from megatron_ultramem.parallel.groups import memory_groups
from megatron_ultramem.parallel.routing import RowOwners
from megatron_ultramem.parallel.traffic import Capacity, Traffic


class ShardedPlacement:
    """Rows over the ranks of `across`, columns over those of `within`; None: not split that way.

    Args:
        capacity: static sizes for the exchange by rows; None: sizes follow the tokens.
        equal_tokens: every rank always brings the same number of tokens (as the trainer's batches do); otherwise the
            exchange by columns finds out the largest number in every call. Within an exchange by rows it gets that
            one's queries, as many on all ranks if `capacity` has room for everything.

    Attributes:
        traffic: counts what this placement's exchanges move.
    """

    def __init__(
        self,
        across: dist.ProcessGroup | None,
        within: dist.ProcessGroup | None,
        *,
        capacity: Capacity | None = None,
        equal_tokens: bool = False,
    ) -> None:
        self.across, self.within = across, within
        self.capacity, self.equal_tokens = capacity, equal_tokens
        self.traffic = Traffic()

    def shard(self, pool: Pool, width: int) -> TableShard:
        column_rank, column_ranks = (self.within.rank(), self.within.size()) if self.within else (0, 1)
        row_rank, row_ranks = (self.across.rank(), self.across.size()) if self.across else (0, 1)
        block = self._block_rows(pool)
        starts = range(row_rank * block, pool.padded_rows, row_ranks * block)
        columns = width // column_ranks
        return TableShard(pool.padded_rows, width, tuple(starts), block, column_rank * columns, columns)

    def path(self, config: MemoryConfig, pool: Pool, device: torch.device) -> LookupPath:
        backend = lookup_backend(config.kernels, device)
        inner: LookupPath = LocalLookup(backend, activation(config), padded=True)
        if self.within is not None:
            inner = ColumnsExchange(
                Channel(self.within, self.traffic, "columns"),
                backend,
                activation(config),
                value_dim=config.value_dim,
                num_cores=num_cores(config),
                equal_tokens=self.equal_tokens if self.across is None else self._holds_all(self.across),
                padded=self.across is not None or blocks(config) > 1,
            )
        if self.across is None:
            return inner
        owners = RowOwners(self.across.size(), self._block_rows(pool))
        channel = Channel(self.across, self.traffic, "rows")
        if self.capacity is not None and self.capacity.to_all(channel.ranks):
            return RowsToAllExchange(channel, owners, inner, self.capacity.tokens)
        return RowsExchange(channel, owners, inner, self.capacity, trim=self.within is None)

    def of_whole_rows(self, amax_N: torch.Tensor) -> None:
        if self.within is not None:
            dist.all_reduce(amax_N, dist.ReduceOp.MAX, group=self.within)

    def _holds_all(self, across: dist.ProcessGroup) -> bool:
        return self.capacity is not None and self.capacity.holds_all(across.size())

    def _block_rows(self, pool: Pool) -> int:
        """Rows dealt to a rank at a time: where layers see only a window of the pool, small enough to spread it evenly
        (about one block of every table for each rank)."""
        ranks = self.across.size() if self.across else 1
        rows = pool.padded_rows // ranks
        if ranks == 1 or pool.virtual_rows > pool.rows - pool.table_rows:
            return rows
        blocks = next(number for number in range(pool.num_tables, 0, -1) if rows % number == 0)
        return rows // blocks


def memory_placement(config: Config, groups: ProcessGroupCollection, *, equal_tokens: bool = True) -> Placement:
    """The placement of a run: parallel.memory_placement. With two_level a collective call."""
    p = config.parallel
    choice = choose(config)
    if choice.placement == "replicated":
        return WholeTables()
    if choice.problem and dist.get_rank() == 0:
        warnings.warn(f"parallel.memory_placement = {choice.label}: {choice.problem}", stacklevel=2)
    capacity = None
    if p.exchange_capacity is not None:
        capacity = Capacity(p.exchange_capacity, tokens_per_rank(config), blocks(config.model.memory))
    two_level = choice.placement == "two_level"
    columns = choice.columns if two_level else None
    whole, within, across = memory_groups(groups, columns, p.timeout_minutes, beside_ffn=p.overlap_exchange)
    if not two_level:
        across, within = (whole, None) if choice.placement == "rows" else (None, whole)
    return ShardedPlacement(across, within, capacity=capacity, equal_tokens=equal_tokens)
