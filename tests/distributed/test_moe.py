"""Megatron's MoE as a baseline: its options train alike under every layout, and its losses are recorded."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.moe_metrics import moe_metrics
from megatron_ultramem.training.setup import set_up
from tests.distributed.layout_job import STEPS, assert_trains_like, train_job
from tests.distributed.workers import WorkerPool

TP2, PP2, EP2 = (f"parallel.{name}_parallel_size=2" for name in ("tensor", "pipeline", "expert"))
BASE = [
    "model.memory.layers=none",
    "model.moe.layers=1-3",
    "model.moe.num_experts=8",
    "model.moe.top_k=2",
    "model.moe.ffn_hidden_size=32",
]
MODELS = {
    "losses": [*BASE, "model.moe.aux_loss_coeff=0.1", "model.moe.z_loss_coeff=0.01", "model.moe.router_dtype=fp64"],
    "shared_expert": [
        *BASE,
        "model.moe.shared_expert_hidden_size=24",
        "model.moe.shared_expert_gate=true",
        "model.moe.load_balancing=seq_aux_loss",
        "model.moe.aux_loss_coeff=0.1",
    ],
    "sigmoid": [
        *BASE,
        "model.moe.router_score=sigmoid",
        "model.moe.expert_bias=true",
        "model.moe.expert_bias_rate=0.05",
        "model.moe.router_scale=2.5",
        "model.moe.router_groups=4",
        "model.moe.router_group_top_k=2",
        "model.moe.aux_loss_coeff=0",
    ],
}
LAYOUTS = {
    "tp2": (2, [TP2]),
    "pp2": (2, [PP2]),
    "dp2": (2, []),
    "ep2": (2, [EP2]),
    "ep2_tp2": (4, [EP2, TP2]),
    "ep2_allgather": (2, [EP2, "model.moe.dispatcher=allgather"]),
    "ep2_tp2_allgather": (4, [EP2, TP2, "model.moe.dispatcher=allgather"]),
    "recompute_full": (1, ["train.recompute=full"]),
}
FAST = [("losses", "tp2"), ("shared_expert", "ep2"), ("sigmoid", "ep2_tp2"), ("losses", "ep2_allgather")]
SLOW = [(model, layout) for model in MODELS for layout in LAYOUTS if (model, layout) not in FAST]
CASES = [pytest.param(*case, id="-".join(case)) for case in FAST]
CASES += [pytest.param(*case, id="-".join(case), marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_training_equals_one_rank(pool: WorkerPool, small_run: list[str], one_rank, model: str, layout: str) -> None:
    ranks, overrides = LAYOUTS[layout]
    results = pool.run(ranks, train_job, small_run + MODELS[model] + overrides, STEPS, True)
    assert_trains_like(one_rank(MODELS[model]), results)


def recorded_losses(overrides: list[str], steps: int) -> list[dict[str, float]]:
    run = set_up(load_config(None, overrides))
    found = []
    for _ in range(steps):
        train_step(run)
        found.append(moe_metrics(run, 8 // run.config.train.micro_batch_size // _data_ranks()))
    return found


def _data_ranks() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_world_size()


def test_recorded_losses_are_means_of_the_step_under_every_layout(pool: WorkerPool, small_run: list[str]) -> None:
    settings = [*small_run, *MODELS["losses"]]
    (alone,) = pool.run(1, recorded_losses, settings, 2)
    assert set(alone[0]) == {"moe/load_balancing_loss", "moe/z_loss"}
    # Of 8 experts, evenly used ones give 1, a single pair of them at most 4.
    assert all(0.99 < step["moe/load_balancing_loss"] < 4 and step["moe/z_loss"] > 0 for step in alone)
    assert alone[0] != alone[1]
    for ranks, layout in ((2, [TP2]), (2, [PP2]), (2, [])):
        for result in pool.run(ranks, recorded_losses, [*settings, *layout], 2):
            for got, wanted in zip(result, alone, strict=True):
                name = "moe/load_balancing_loss"
                assert got[name] == pytest.approx(wanted[name], rel=1e-5)
                # Megatron does not add up the z-loss over ranks: each has that of its own tokens.
                assert np.isfinite(got["moe/z_loss"])


def test_a_deeper_model_in_the_same_process_is_recorded_too(pool: WorkerPool, small_run: list[str]) -> None:
    settings = [*small_run, *MODELS["losses"]]
    for layers in (4, 6):
        deeper = [*settings, f"model.num_layers={layers}", f"model.moe.layers=1-{layers - 1}"]
        ((found,),) = pool.run(1, recorded_losses, deeper, 1)
        assert 0.99 < found["moe/load_balancing_loss"] < 4


def test_without_moe_layers_nothing_is_recorded(pool: WorkerPool, small_run: list[str]) -> None:
    assert pool.run(1, recorded_losses, small_run, 1) == [[{}]]
