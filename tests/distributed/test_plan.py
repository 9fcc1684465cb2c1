"""What the planner says that a rank holds and receives, against real runs on CPU ranks."""

from __future__ import annotations

import pytest

from tests.distributed.plan_job import held_and_received
from tests.distributed.test_memory_parallel import (
    COLUMNS,
    INTERLEAVED,
    MODELS,
    P2,
    P4,
    PLAIN,
    PP2,
    ROWS,
    STATIC,
    TP2,
    TWO_LEVEL,
)
from tests.distributed.workers import WorkerPool

MEMORY_RECOMPUTE, FULL = "model.memory.recompute=true", "train.recompute=full"
UNTIED = "model.tie_embeddings=false"
LAYOUTS = {
    ("block", "one_rank"): (1, []),
    ("ring", "dp2"): (2, []),
    ("block", "dp2_plain_optimizer"): (2, [PLAIN]),
    ("block", "tp2"): (2, [TP2]),
    ("block", "pp2"): (2, [PP2]),
    ("block", "columns_p2"): (2, [P2, COLUMNS]),
    ("block", "columns_p2_fp8_tables"): (2, [P2, COLUMNS, "model.memory.table_read=fp8"]),
    ("ring", "columns_p4_recompute"): (4, [P4, COLUMNS, FULL]),
    ("block", "rows_p2_static"): (2, [P2, ROWS, f"{STATIC}=2.0", MEMORY_RECOMPUTE]),
    ("block", "rows_tp2_dp2_untied"): (4, [P2, ROWS, f"{STATIC}=2.0", TP2, UNTIED]),
    ("deep_block", "columns_pp2_interleaved"): (4, [P2, COLUMNS, *INTERLEAVED]),
    ("moe", "tp2_recompute"): (2, [TP2, FULL]),
}
CASES = [pytest.param(*case, *layout, id="-".join(case)) for case, layout in LAYOUTS.items()]


@pytest.mark.parametrize(("model", "layout", "ranks", "settings"), CASES)
def test_ranks_hold_and_receive_what_the_planner_says(
    pool: WorkerPool, small_run: list[str], model: str, layout: str, ranks: int, settings: list[str]
) -> None:
    for result in pool.run(ranks, held_and_received, small_run + MODELS[model] + settings):
        held, planned = result["parameters"]
        assert planned == held
        held, planned = result["state"]
        assert planned == pytest.approx(held, rel=0.04)  # Megatron pads parameters in its buffers
        counted, planned = result["exchange"]
        assert planned == counted
        received, planned = result["received"]
        received = {group: moved for group, moved in received.items() if moved > 200}  # norms, losses, counts
        if settings[-3:] == INTERLEAVED:  # messages of one direction between two stages go over all ranks
            pipeline = result["pipeline"]
            received[pipeline] = received.get(pipeline, 0) + received.pop((0, 1, 2, 3), 0)
        assert planned == pytest.approx(received, rel=0.04)


def test_two_levels_with_room_for_everything_are_planned_to_the_byte(pool: WorkerPool, small_run: list[str]) -> None:
    for result in pool.run(4, held_and_received, [*small_run, *MODELS["ring"], *TWO_LEVEL, f"{STATIC}=2"]):
        counted, planned = result["exchange"]
        assert planned == counted > 0


def test_dynamic_rows_and_experts_are_planned_as_evenly_used(pool: WorkerPool, small_run: list[str]) -> None:
    """What moves then depends on the tokens."""
    for result in pool.run(2, held_and_received, small_run + MODELS["ring"] + [P2, ROWS]):
        counted, planned = result["exchange"]
        assert planned == pytest.approx(counted, rel=0.1)
    experts_alone = ["model.memory.layers=none", "parallel.expert_parallel_size=2"]
    for result in pool.run(2, held_and_received, small_run + MODELS["moe"] + experts_alone):
        received, planned = result["received"]
        assert planned[0, 1] == pytest.approx(received[0, 1], rel=0.1)
