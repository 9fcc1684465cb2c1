"""Process groups: who shares what in the two-level placement, and for how long a collective is waited for."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ultramem.config import load_config
from megatron_ultramem.parallel.groups import memory_groups
from megatron_ultramem.platform import prepare
from megatron_ultramem.training.distributed import initialize_distributed
from tests.distributed.workers import WorkerPool


def groups_job(minutes: float) -> dict[str, tuple[list[int], datetime.timedelta]]:
    """Ranks and timeout of torch's default group and of those that exchanges use."""
    settings = ["parallel.memory_parallel_size=4", "parallel.memory_placement=two_level", "parallel.memory_columns=2"]
    config = load_config(None, [*settings, f"parallel.timeout_minutes={minutes}"])
    initialize_distributed(config, prepare())
    found = memory_groups(ProcessGroupCollection.use_mpu_process_groups(), 2, minutes)
    named: dict[str, Any] = {"world": dist.group.WORLD, **found._asdict()}
    cpu = torch.device("cpu")
    return {
        name: (dist.get_process_group_ranks(group), group._get_backend(cpu).options._timeout)
        for name, group in named.items()
    }


@pytest.mark.parametrize("minutes", [0.5, 2.5])
def test_every_group_of_an_exchange_waits_as_long_as_the_setting_says(pool: WorkerPool, minutes: float) -> None:
    for rank, groups in enumerate(pool.run(4, groups_job, minutes)):
        assert {timeout for _, timeout in groups.values()} == {datetime.timedelta(minutes=minutes)}
        first = rank // 2 * 2
        assert groups["whole"][0] == [0, 1, 2, 3]
        assert groups["within"][0] == [first, first + 1] and groups["across"][0] == [rank % 2, rank % 2 + 2]
