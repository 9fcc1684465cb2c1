"""Ranks launch collectives in one order, the memory exchange among those of other communicators: what keeps kernels of
NCCL that run beside each other from waiting for each other in a circle."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ultramem.config import load_config
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.setup import set_up
from tests.distributed import test_baselines
from tests.distributed.plan_job import group_among
from tests.distributed.test_memory_parallel import COLUMNS, EP2, MODELS, OVERLAP, P2, ROWS, STATIC, TP2
from tests.distributed.workers import WorkerPool

GRAD_OVERLAP, _, SMALL_BUCKETS = OVERLAP
CASES = {
    "columns_tp2": (2, [*MODELS["no_ring"], P2, COLUMNS, TP2]),
    "columns_ep2": (2, [*MODELS["moe"], P2, COLUMNS, EP2]),
    "rows_tp2_join_layers": (2, [*test_baselines.KINDS["ultramem"], P2, ROWS, TP2]),
    "rows_overflow_ep2_dp2": (4, [*MODELS["moe"], P2, ROWS, EP2, f"{STATIC}=1.1", GRAD_OVERLAP, SMALL_BUCKETS]),
    "rows_overflow_tp2_dp2": (4, [*MODELS["ring"], P2, ROWS, TP2, f"{STATIC}=1.1", GRAD_OVERLAP, SMALL_BUCKETS]),
}
Launch = tuple[tuple[int, ...], str, str]  # ranks and name of the group, operation


class Launches(TorchDispatchMode):
    """Every collective of this rank, in the order in which the host launches them."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (group := group_among(args)) is not None:
            ranks = tuple(dist.get_process_group_ranks(group))
            self.order.append((ranks, group.group_name, func._opname))
        return func(*args, **(kwargs or {}))


def launches_of_a_step(overrides: list[str]) -> list[Launch]:
    run = set_up(load_config(None, overrides))
    train_step(run)
    with Launches() as launches:
        train_step(run)
    return launches.order


SLOW = {"columns_ep2", "rows_overflow_ep2_dp2"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES])
def test_ranks_launch_what_they_share_in_one_order(pool: WorkerPool, small_run: list[str], case: str) -> None:
    ranks, settings = CASES[case]
    launched = pool.run(ranks, launches_of_a_step, [*small_run, *settings])
    for a, b in combinations(range(ranks), 2):
        first, second = ([launch for launch in launched[rank] if {a, b} <= set(launch[0])] for rank in (a, b))
        assert first == second, f"ranks {a} and {b}"
    groups = [name for ranks_of_group, name, _ in launched[0] if len(ranks_of_group) > 1]
    assert len(set(groups)) > 1 and sum(x != y for x, y in zip(groups, groups[1:], strict=False)) > 20  # interleaved
