"""Ranks that were started with different settings say so, before anything can hang."""

from __future__ import annotations

import os

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.platform import prepare
from megatron_ultramem.training.distributed import initialize_distributed
from tests.distributed.workers import WorkerPool


def start_with(settings: list[str], of_rank: dict[int, list[str]]) -> str:
    """Initialises the groups with the settings of this rank; returns the error."""
    config = load_config(None, [*settings, *of_rank.get(int(os.environ["RANK"]), [])])
    try:
        initialize_distributed(config, prepare("auto"))
    except ConfigError as error:
        return str(error)
    return ""


def test_equal_settings_are_accepted(pool: WorkerPool, small_run: list[str]) -> None:
    assert pool.run(2, start_with, small_run, {}) == ["", ""]


@pytest.mark.parametrize("odd", [0, 2])
def test_the_odd_rank_and_its_settings_are_named_on_every_rank(
    pool: WorkerPool, small_run: list[str], odd: int
) -> None:
    different = {odd: ["optimizer.lr=0.5", "parallel.memory_parallel_size=3", "model.memory.rows_multiple=96"]}
    for message in pool.run(3, start_with, [*small_run, "train.global_batch_size=12"], different):
        assert f"rank {odd}: " in message and "rank 1: model" not in message
        assert "optimizer.lr = 0.5" in message and "parallel.memory_parallel_size = 3" in message
        assert "(rank " in message and message.count("legal") == 1
