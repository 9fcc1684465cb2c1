"""Value tables whose optimizer lives in host memory: the same training to fp32 round-off, the same checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ultramem.config import load_config
from megatron_ultramem.training.loop import evaluate, train_step
from megatron_ultramem.training.offload import OffloadingOptimizer
from megatron_ultramem.training.setup import Run, set_up
from tests.distributed.checkpoint_job import shards_and_losses, state, train_and_save
from tests.distributed.layout_job import assemble
from tests.distributed.test_resume import assert_equal
from tests.distributed.workers import WorkerPool

PLAIN, BF16 = "parallel.distributed_optimizer=false", "train.precision=bf16"
HOST = "optimizer.value_offload=torch"
MP2 = ["parallel.memory_parallel_size=2", "parallel.memory_placement=rows"]
PP2 = "parallel.pipeline_parallel_size=2"
MOE = [
    "model.memory.layers=1-2",
    "model.moe.layers=2-3",
    "model.moe.num_experts=4",
    "model.moe.top_k=2",
    "model.moe.ffn_hidden_size=32",
]
SHARED = ["model.memory.sharing=block", "model.memory.share_size=2"]
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "parallel.bucket_size=20000"]
CASES: dict[str, tuple[int, list[str]]] = {
    "1_rank": (1, SHARED),
    "1_rank_plain": (1, [PLAIN, *SHARED]),
    "1_rank_bf16": (1, [BF16]),
    "1_rank_bf16_plain": (1, [BF16, PLAIN]),
    "replicas": (2, []),
    "replicas_bf16": (2, [BF16]),
    "replicas_plain": (2, [PLAIN]),
    "replicas_bf16_plain": (2, [BF16, PLAIN]),
    "replicas_overlapped_gather": (2, OVERLAP),
    "rows": (2, MP2),
    "rows_bf16": (2, [*MP2, BF16]),
    "moe_bf16": (2, [*MOE, BF16]),
    "moe_plain": (1, [*MOE, PLAIN]),
    "stages": (2, [PP2, *SHARED]),
    "stage_without_memory": (2, [PP2, "model.memory.layers=2-3", BF16]),
    "no_clipping": (1, ["optimizer.clip_grad=0"]),
}
FAST = {"1_rank_bf16", "replicas_bf16", "1_rank_plain"}
STEPS = 4


def cases(fast: set[str] = FAST) -> list[Any]:
    return [pytest.param(*case, id=n, marks=[] if n in fast else pytest.mark.slow) for n, case in CASES.items()]


@pytest.mark.parametrize(("ranks", "layout"), cases())
def test_training_is_the_same_to_round_off(
    pool: WorkerPool, small_run: list[str], tmp_path: Path, ranks: int, layout: list[str]
) -> None:
    settings = [*small_run, *layout, f"checkpoint.dir={tmp_path}", "optimizer.value_weight_decay=0.3"]
    on_device = pool.run(ranks, shards_and_losses, settings, STEPS)
    on_host = pool.run(ranks, shards_and_losses, [*settings, HOST], STEPS)
    expected, found = (assemble([result["end"] for result in results]) for results in (on_device, on_host))
    assert found.keys() == expected.keys()
    assert any(key.startswith("optimizer") and "pools" in key for key in expected)
    bf16 = BF16 in layout
    for key, wanted in expected.items():
        # A parameter in bf16 may be rounded the other way; its master weight is a fp32 number of the optimizer's state.
        tolerance = 1e-2 if bf16 else 2e-5
        np.testing.assert_allclose(
            found[key], wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max() + 1e-12, err_msg=key
        )
    for mine, theirs in zip(on_host, on_device, strict=True):
        np.testing.assert_allclose(mine["losses"], theirs["losses"], rtol=1e-3 if bf16 else 1e-6)


@pytest.mark.parametrize(("ranks", "layout"), cases({"replicas_bf16"}))
def test_a_resumed_run_is_bitwise_equal_and_checkpoints_fit_both_ways(
    pool: WorkerPool, small_run: list[str], tmp_path: Path, ranks: int, layout: list[str]
) -> None:
    settings = [*small_run, *layout, "checkpoint.load=auto", "checkpoint.keep_last=0", "train.steps=4"]
    here = [*settings, f"checkpoint.dir={tmp_path / 'host'}", HOST]
    straight = pool.run(ranks, train_and_save, [*settings, f"checkpoint.dir={tmp_path / 'unused'}", HOST], STEPS)
    before = pool.run(ranks, train_and_save, here, STEPS // 2, (STEPS // 2,))
    after = pool.run(ranks, train_and_save, here, STEPS)
    for rank in range(ranks):
        assert after[rank]["first_step"] == STEPS // 2 and not after[rank]["warnings"]
        assert_equal(after[rank]["start"], before[rank]["end"])
        assert_equal(after[rank]["end"], straight[rank]["end"])
    # The checkpoint loads into an optimizer on the device, and what that saves into one on the host, by every bit.
    saved = tmp_path / "host" / "step_00000002"
    there = [*settings, f"checkpoint.load={saved}", f"checkpoint.dir={tmp_path / 'device'}"]
    host = pool.run(ranks, shards_and_losses, [*there, HOST], 2)
    device = pool.run(ranks, shards_and_losses, there, 3, True)
    again = f"checkpoint.load={tmp_path / 'device' / 'step_00000003'}"
    back = pool.run(ranks, shards_and_losses, [*settings, HOST, again], 3)
    assert_same_shards(host, device, "start")
    assert_same_shards(back, device, "end")


def assert_same_shards(found: list[dict[str, Any]], expected: list[dict[str, Any]], when: str) -> None:
    """What was loaded is what was there, at the start or the end of another run, by every bit."""
    loaded, wanted = (
        assemble([result[which] for result in results]) for results, which in ((found, "start"), (expected, when))
    )
    assert loaded.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(loaded[key], value, err_msg=key)


@pytest.mark.parametrize(("ranks", "layout"), [(1, [BF16]), pytest.param(2, MP2, marks=pytest.mark.slow)])
def test_the_overlap_changes_no_bit(pool: WorkerPool, small_run: list[str], ranks: int, layout: list[str]) -> None:
    settings = [*small_run, *layout, HOST, "checkpoint.load=none"]
    overlapped = pool.run(ranks, _train, settings, True)
    waiting = pool.run(ranks, _train, settings, False)
    for mine, theirs in zip(overlapped, waiting, strict=True):
        assert mine["overlaps"] and not theirs["overlaps"]
        assert mine["losses"] == theirs["losses"] and mine["valid"] == theirs["valid"]
        assert_equal(mine["state"], theirs["state"])


def _train(overrides: list[str], overlaps: bool) -> dict[str, Any]:
    run = set_up(load_config(None, overrides))
    offload = _offload(run)
    offload._overlaps &= overlaps
    losses, valid = [], []
    for _ in range(STEPS):
        losses.append(train_step(run)["loss"])
        valid.append(evaluate(run))
    return {"overlaps": offload._overlaps, "losses": losses, "valid": valid, "state": state(run)}


def test_a_failed_update_is_raised_where_the_table_is_used_next(pool: WorkerPool, small_run: list[str]) -> None:
    (message,) = pool.run(1, _train_with_a_broken_host, [*small_run, HOST])
    assert message == "the host is out of order"


def _train_with_a_broken_host(overrides: list[str]) -> str:
    run = set_up(load_config(None, overrides))
    train_step(run)
    _offload(run).settle(_offload(run).tables)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the host is out of order")

    _offload(run).tables[0].adam.update = fail  # type: ignore[method-assign]
    train_step(run)
    try:
        train_step(run)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_the_device_holds_nothing_but_the_parameter_and_its_gradient(pool: WorkerPool, small_run: list[str]) -> None:
    for elements in pool.run(2, _elements_beside_the_tables, [*small_run, HOST, BF16]):
        assert elements["lent"] == elements["tables"]  # one each
        assert elements["masters"] == 0


def _elements_beside_the_tables(overrides: list[str]) -> dict[str, int]:
    run = set_up(load_config(None, overrides))
    offload = _offload(run)
    train_step(run)
    part = offload.chained_optimizers[-1]
    masters = [master for group in part.shard_fp32_from_float16_groups for master in group]
    return {
        "tables": len(offload.tables),
        "lent": sum(table.lent.untyped_storage().size() // 4 for table in offload.tables),
        "masters": sum(master.numel() for master in masters),
    }


def _offload(run: Run) -> OffloadingOptimizer:
    assert isinstance(run.optimizer, OffloadingOptimizer) and torch.is_tensor(run.optimizer.tables[0].master)
    return run.optimizer
