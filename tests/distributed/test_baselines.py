"""Every kind of memory layer trains alike under every layout and placement, and its checkpoints fit them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.checkpoint_job import train_and_save
from tests.distributed.layout_job import STEPS, assert_trains_like, train_job
from tests.distributed.test_memory_parallel import step_traffic
from tests.distributed.workers import WorkerPool

P2 = "parallel.memory_parallel_size=2"
ROWS, COLUMNS = "parallel.memory_placement=rows", "parallel.memory_placement=columns"
TP2, PP2 = "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"
PLAIN = "parallel.distributed_optimizer=false"
INTERLEAVED = [PP2, "parallel.virtual_pipeline_stages=2", "parallel.overlap_p2p=true"]
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "parallel.bucket_size=20000"]
MOE = ["model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.ffn_hidden_size=32", "model.moe.aux_loss_coeff=0"]
NO_PRE_VALUES = "model.memory.pre_value_dim=192"
WIDE = "model.memory.value_dim=32"
KINDS = {
    "ultramem": [
        "model.memory.kind=ultramem",
        "model.memory.layers=0,2",
        "model.memory.join_layers=1,3",
        "model.memory.num_heads=2",
        "model.memory.tucker_penalty_threshold=0.0",
        NO_PRE_VALUES,
    ],
    "memory_plus": ["model.memory.kind=memory_plus", "model.memory.pool_size=2", NO_PRE_VALUES],
    "pkm": ["model.memory.kind=pkm", "model.memory.layers=0,3", "model.memory.num_heads=2", WIDE, NO_PRE_VALUES],
    "peer": ["model.memory.kind=peer", "model.memory.layers=1-2", WIDE, "model.memory.pre_value_dim=32"],
    "deep_ultramem": [
        "model.num_layers=8",
        "model.memory.kind=ultramem",
        "model.memory.layers=0,2,4,6",
        "model.memory.join_layers=1,3,5,7",
        NO_PRE_VALUES,
    ],
}
BESIDE_MOE = ["model.memory.replaces_ffn=false", "model.moe.layers=0-2", *MOE]
KINDS |= {f"{kind}_and_moe": [*KINDS[kind], *BESIDE_MOE] for kind in ("ultramem", "memory_plus", "pkm", "peer")}
KINDS["ultramem_v2_and_moe"] = ["model.moe.layers=0-2", *MOE]

LAYOUTS = {
    "tp2": (2, [TP2]),
    "pp2": (2, [PP2]),
    "dp2": (2, []),
    "rows": (2, [P2, ROWS]),
    "columns": (2, [P2, COLUMNS]),
    "tp2_pp2": (4, [TP2, PP2]),
    "rows_tp2_static": (4, [P2, ROWS, TP2, "parallel.exchange_capacity=0.7"]),
    "two_level": (
        4,
        ["parallel.memory_parallel_size=4", "parallel.memory_placement=two_level", "parallel.memory_columns=2"],
    ),
    "dp2_overlap": (2, OVERLAP),
    "rows_overlap_plain": (2, [P2, ROWS, PLAIN]),
    "recompute_full": (1, ["train.recompute=full"]),
    "recompute_memory": (1, ["model.memory.recompute=true"]),
    "interleaved": (2, INTERLEAVED),
    "rows_with_experts": (2, [P2, ROWS, "parallel.expert_parallel_size=2"]),
}
FAST = [
    ("ultramem", "tp2"),
    ("ultramem", "rows"),
    ("memory_plus", "pp2"),
    ("memory_plus", "columns"),
    ("pkm", "tp2"),
    ("peer", "rows"),
    ("memory_plus_and_moe", "dp2"),
]
SLOW = [
    (kind, layout)
    for kind in ("ultramem", "memory_plus", "pkm", "peer")
    for layout in LAYOUTS
    if layout not in ("interleaved", "rows_with_experts")
    and (kind, layout) not in [*FAST, ("ultramem", "recompute_full")]  # refused: a joined block is not on its own
]
SLOW += [("deep_ultramem", "interleaved")]
SLOW += [(kind, layout) for kind in KINDS if "moe" in kind for layout in ("tp2", "pp2", "rows_with_experts")]
CASES = [pytest.param(*case, id="-".join(case)) for case in FAST]
CASES += [pytest.param(*case, id="-".join(case), marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_training_equals_one_rank(
    pool: WorkerPool, small_run: list[str], one_rank: Callable[[list[str]], dict], kind: str, layout: str
) -> None:
    ranks, overrides = LAYOUTS[layout]
    results = pool.run(ranks, train_job, small_run + KINDS[kind] + overrides, STEPS, True)
    expected = one_rank(KINDS[kind])
    assert_trains_like(expected, results)
    memory = [
        numbers for key, *_, numbers in expected["grads"] if ("pools" in key or "memory" in key) and "_mean" not in key
    ]
    assert memory and all(np.abs(numbers).max() > 0 for numbers in memory)


@pytest.mark.parametrize(
    "kind", ["ultramem", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("memory_plus", "pkm", "peer"))]
)
def test_a_step_moves_what_the_planner_says(pool: WorkerPool, small_run: list[str], kind: str) -> None:
    lookups = (4 if kind == "memory_plus" else 2) * 8 // 2  # layers x samples of a rank in a step
    settings = [*small_run, *KINDS[kind], P2, "model.memory.rows_multiple=16"]  # no padding, which is never looked up
    for result in pool.run(2, step_traffic, [*settings, COLUMNS]):
        assert result["received"] == tuple(lookups * moved for moved in result["columns"])
    for result in pool.run(2, step_traffic, [*settings, ROWS]):
        for moved, expected in zip(result["received"], result["rows"], strict=True):
            assert moved == pytest.approx(lookups * expected, rel=0.15)  # the planner takes rows as evenly used


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("pkm", [TP2]),
        *(
            pytest.param(kind, target, marks=pytest.mark.slow)
            for kind in ("ultramem", "memory_plus", "peer")
            for target in ([TP2], [P2, COLUMNS])
        ),
    ],
)
def test_a_checkpoint_of_rows_goes_on_under_another_layout(
    pool: WorkerPool, small_run: list[str], tmp_path: Path, kind: str, target: list[str]
) -> None:
    settings = [*small_run, *KINDS[kind], f"checkpoint.dir={tmp_path}"]
    straight = pool.run(2, train_and_save, [*settings, P2, ROWS], 4, (2,))[0]
    results = pool.run(2, train_and_save, [*settings, *target, f"checkpoint.load={tmp_path / 'step_00000002'}"], 4)
    assert results[0]["first_step"] == 2
    for step in (3, 4):
        assert results[0]["steps"][step]["loss"] == pytest.approx(straight["steps"][step]["loss"], rel=2e-6)
    norms = [name for name in straight["end"]["params"] if "running" in name]
    assert bool(norms) == (kind in ("pkm", "peer"))
    for name in norms:
        wanted = straight["end"]["params"][name]
        np.testing.assert_allclose(results[0]["end"]["params"][name], wanted, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "kind", ["peer", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ultramem", "memory_plus"))]
)
def test_a_resumed_run_continues_bitwise(pool: WorkerPool, small_run: list[str], tmp_path: Path, kind: str) -> None:
    settings = [*small_run, *KINDS[kind], f"checkpoint.dir={tmp_path}", "checkpoint.load=auto"]
    (straight,) = pool.run(1, train_and_save, settings, 4, (2,))
    (resumed,) = pool.run(1, train_and_save, settings, 4)
    assert resumed["first_step"] == 2
    for name, wanted in straight["end"]["params"].items():
        np.testing.assert_array_equal(resumed["end"]["params"][name], wanted, err_msg=name)
