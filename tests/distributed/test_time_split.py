"""Operations of a step, forward and backward, fall into the component that they belong to."""

from __future__ import annotations

import pytest

from tests.distributed.split_job import split_job
from tests.distributed.workers import WorkerPool

LAYERS, MICRO_BATCHES = 4, 2
ONE_HEAD = ["model.num_layers=4", "train.global_batch_size=2", "data.num_workers=0"]


@pytest.mark.parametrize("with_memory", [True, False], ids=["memory", "dense"])
def test_products_of_forward_and_backward_belong_to_their_module(
    pool: WorkerPool, small_run: list[str], with_memory: bool
) -> None:
    memory = [] if with_memory else ["model.memory.layers=none"]
    ((found, watched, plain),) = pool.run(1, split_job, [*small_run, *ONE_HEAD, *memory], "aten::mm")
    # A linear is one product forward and two backward; two linears in each module, but three in a memory layer.
    passes = LAYERS * MICRO_BATCHES
    assert found["attention"] == found["ffn"] == 2 * 3 * passes
    assert found["memory"] == (3 * 3 * passes if with_memory else 0)
    assert watched == plain  # being watched changes nothing
