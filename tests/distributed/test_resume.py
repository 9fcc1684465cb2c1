"""Exact resume: N steps straight equal N/2, new processes' state from the checkpoint, and N/2 more, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.checkpoint_job import train_and_save
from tests.distributed.workers import WorkerPool

STEPS = 6
TP2, PP2 = "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"
PLAIN = "parallel.distributed_optimizer=false"
# Everything that has a state of its own: dropout, warm-up then decay, the values' own learning rate, weight decay.
COMMON = [
    "model.memory.sharing=block",
    "model.memory.share_size=2",
    "model.hidden_dropout=0.1",
    "model.attention_dropout=0.1",
    "schedule.kind=wsd",
    "schedule.wsd_decay_steps=2",
    f"train.steps={STEPS}",
    "optimizer.value_lr_times=4.0",
]
CASES: dict[str, tuple[int, list[str]]] = {
    "1_rank": (1, []),
    "1_rank_plain_optimizer": (1, [PLAIN]),
    "dp2": (2, []),
    "dp2_plain_optimizer": (2, [PLAIN]),
    "pp2": (2, [PP2]),
    "tp2": (2, [TP2]),
    "tp2_plain_optimizer": (2, [TP2, PLAIN]),
    "tp2_pp2": (4, [TP2, PP2]),
    "dp2_overlap": (
        2,
        ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "parallel.bucket_size=20000"],
    ),
    "pp2_interleaved": (
        2,
        [PP2, "model.num_layers=8", "parallel.virtual_pipeline_stages=2", "parallel.overlap_p2p=true"],
    ),
    "memory_parallel": (2, ["parallel.memory_parallel_size=2", "parallel.memory_placement=rows"]),
    "ramp_up": (1, ["train.rampup_batch_size=[4,2,12]"]),
    "async_ramp_up": (2, ["checkpoint.async_save=true", "train.rampup_batch_size=[4,2,12]"]),
    "bf16": (2, ["train.precision=bf16"]),
    "bf16_plain_optimizer": (1, ["train.precision=bf16", PLAIN]),
    "workers": (1, ["data.num_workers=1"]),
    "recompute": (1, ["train.recompute=full"]),
    "memory_on_the_first_stage": (2, [PP2, "model.memory.layers=0-1"]),
    "memory_on_the_last_stage": (2, [PP2, "model.memory.layers=2-3"]),
    "memory_on_the_first_stage_plain_optimizer": (2, [PP2, "model.memory.layers=0-1", PLAIN]),
    "memory_on_the_last_stage_plain_optimizer": (2, [PP2, "model.memory.layers=2-3", PLAIN]),
    "no_memory": (2, ["model.memory.layers=none"]),
    "moe": (
        2,
        [
            "model.memory.layers=1-2",
            "model.memory.sharing=none",
            "model.memory.share_size=1",
            "model.moe.layers=2-3",
            "model.moe.num_experts=4",
            "model.moe.top_k=2",
            "model.moe.ffn_hidden_size=32",
        ],
    ),
}
FAST = {"pp2", "tp2", "memory_parallel", "async_ramp_up"}


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [pytest.param(*case, id=name, marks=[] if name in FAST else pytest.mark.slow) for name, case in CASES.items()],
)
def test_a_resumed_run_is_bitwise_equal_to_one_that_never_stopped(
    pool: WorkerPool, small_run: list[str], tmp_path: Path, ranks: int, layout: list[str]
) -> None:
    settings = [*small_run, *COMMON, *layout, "checkpoint.load=auto"]
    straight = pool.run(ranks, train_and_save, [*settings, f"checkpoint.dir={tmp_path / 'unused'}"], STEPS)
    settings = [*settings, f"checkpoint.dir={tmp_path / 'checkpoints'}"]
    before = pool.run(ranks, train_and_save, settings, STEPS // 2, (STEPS // 2,))
    after = pool.run(ranks, train_and_save, settings, STEPS)
    for rank in range(ranks):
        assert before[rank]["first_step"] == 0
        assert after[rank]["first_step"] == STEPS // 2
        assert_equal(after[rank]["start"], before[rank]["end"])
        assert before[rank]["steps"] | after[rank]["steps"] == straight[rank]["steps"]
        assert_equal(after[rank]["end"], straight[rank]["end"])
        assert not after[rank]["warnings"]


def assert_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit by bit, for parameters, optimizer state and random states."""
    for kind in expected:
        assert actual[kind].keys() == expected[kind].keys()
        assert expected[kind], f"no {kind} was compared"
        for name, wanted in expected[kind].items():
            assert np.isfinite(wanted.astype(np.float64)).all()
            np.testing.assert_array_equal(actual[kind][name], wanted, err_msg=f"{kind} {name}")
