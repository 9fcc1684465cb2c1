"""A rank never holds more than its share of the tables, which start with the same numbers however they are shared."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed.layout_job import assemble
from tests.distributed.memory_share_job import bitwise_run, initial_shards, largest_allocation
from tests.distributed.test_memory_parallel import COLUMNS, P2, P4, ROWS, TWO_LEVEL
from tests.distributed.workers import WorkerPool

RING = ["model.memory.sharing=ring", "model.memory.share_size=2", "model.memory.pool_size=4"]
# Tables far larger than anything else in the model, and drawn in blocks far smaller than they are.
BIG = [*RING, "model.memory.num_keys=64", "model.memory.value_dim=64", "model.memory.pre_value_dim=32"]
BLOCK = 1 << 14
TABLE_BYTES = 4 * 64 * 64 * (64 + 32) * 4
PLACEMENTS = {"rows": [P4, ROWS], "columns": [P4, COLUMNS], "two_level": TWO_LEVEL}


def test_one_rank_holds_whole_tables(pool: WorkerPool, small_run: list[str]) -> None:
    ((largest, tables),) = pool.run(1, largest_allocation, small_run + BIG, BLOCK)
    assert tables == TABLE_BYTES and largest >= TABLE_BYTES  # the gradient buffer


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_no_allocation_is_larger_than_the_share_of_a_rank(
    pool: WorkerPool, small_run: list[str], placement: str
) -> None:
    for largest, tables in pool.run(4, largest_allocation, small_run + BIG + PLACEMENTS[placement], BLOCK):
        assert tables == TABLE_BYTES // 4
        assert largest <= 1.01 * TABLE_BYTES / 4  # the gradient buffer of both tables, with its padding


def test_initial_numbers_do_not_depend_on_the_placement(pool: WorkerPool, small_run: list[str]) -> None:
    (one,) = pool.run(1, initial_shards, small_run + RING, 64)
    expected = assemble([one])
    for placement, settings in PLACEMENTS.items():
        found = assemble(pool.run(4, initial_shards, small_run + RING + settings, 64))
        assert found.keys() == expected.keys()
        for key, numbers in expected.items():
            np.testing.assert_array_equal(found[key], numbers, err_msg=f"{key} under {placement}")


@pytest.mark.parametrize("placement", [ROWS, COLUMNS])
def test_two_deterministic_runs_are_bitwise_equal(pool: WorkerPool, small_run: list[str], placement: str) -> None:
    settings = [*small_run, *RING, P2, placement, "train.deterministic=true"]
    runs = [pool.run(2, bitwise_run, settings, 3) for _ in range(2)]
    for (losses, params), (losses_again, params_again) in zip(*runs, strict=True):
        assert losses == losses_again
        for name, numbers in params.items():
            np.testing.assert_array_equal(params_again[name], numbers, err_msg=name)
