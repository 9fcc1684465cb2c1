"""The process groups of memory-parallel.

The memory-parallel group is Megatron's expert group (with expert tensor parallelism of 1), so that Megatron's buffers,
distributed optimizer, clipping and checkpoints treat shards of tables as expert parameters.
"""

from __future__ import annotations

import datetime
from typing import NamedTuple

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection


class MemoryGroups(NamedTuple):
    """`whole`: all ranks that share the pools. For the two-level placement also `within`, consecutive ranks of it (of a
    node) that share columns, and `across`, the ranks with the same columns that share rows."""

    whole: dist.ProcessGroup
    within: dist.ProcessGroup | None = None
    across: dist.ProcessGroup | None = None


def memory_groups(
    groups: ProcessGroupCollection, columns: int | None, timeout_minutes: float, *, beside_ffn: bool = False
) -> MemoryGroups:
    """The groups of this rank; creates those of the two-level placement, in a collective call of the whole group.

    Args:
        columns: ranks that split the columns in that placement; None: another placement, without such groups.
        beside_ffn: the exchange overlaps with the FFN; NCCL's communicators then get streams of high priority.
    """
    whole = groups.tp_ep
    if columns is None:
        return MemoryGroups(whole)
    ranks = dist.get_process_group_ranks(whole)
    place = ranks.index(dist.get_rank())
    first = place - place % columns
    within = ranks[first : first + columns]
    across = ranks[place % columns :: columns]
    timeout = datetime.timedelta(minutes=timeout_minutes)

    def create(ranks: list[int]) -> dist.ProcessGroup:
        options = None
        if beside_ffn and dist.get_backend(whole) == "nccl":
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            options._timeout = timeout
        return dist.new_group(ranks, timeout=timeout, pg_options=options, use_local_synchronization=True)

    return MemoryGroups(whole, create(within), create(across))
