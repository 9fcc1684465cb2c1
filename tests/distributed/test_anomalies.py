"""Batches that go wrong are passed over, or the run goes back, exactly; what happened is in the metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.anomaly_job import train_step_by_step, train_whole
from tests.distributed.test_resume import assert_equal
from tests.distributed.workers import WorkerPool

NAN = math.nan
BATCH = 8  # samples of a step
PP2 = "parallel.pipeline_parallel_size=2"
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "parallel.bucket_size=20000"]
PEER = ["model.memory.kind=peer", "model.memory.value_dim=32", "model.memory.pre_value_dim=32"]
LAYOUTS = {
    "pp2": [PP2],
    "overlap": OVERLAP,
    "plain": ["parallel.distributed_optimizer=false"],
    "bf16": ["train.precision=bf16"],
}


@pytest.fixture
def settings(small_run: list[str], tmp_path: Path) -> list[str]:
    return [
        *small_run,
        f"train.run_dir={tmp_path}",
        "checkpoint.load=auto",
        "logging.interval=1",
        "train.eval_steps=0",
        "model.hidden_dropout=0.1",
    ]


def lines(tmp_path: Path) -> dict[int, dict]:
    """The metrics by step, those of one step together."""
    found: dict[int, dict] = {}
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        found.setdefault(values["step"], {}).update(values)
    return found


def updated(state: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
    """Of a rank's state, what a step updates; u and t follow from the parameters, one step later."""
    params = {
        name: value for name, value in state["params"].items() if not name.endswith(("retrieval.u", "retrieval.t"))
    }
    return {"params": params, "optimizer": state["optimizer"]}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name == "pp2" else pytest.mark.slow) for name in LAYOUTS]
)
def test_a_skipped_batch_changes_nothing_but_the_position(pool: WorkerPool, settings: list[str], layout: str) -> None:
    overrides = [*settings, "faults.on_nonfinite=skip", *LAYOUTS[layout]]
    for results in pool.run(2, train_step_by_step, overrides, 4, {2 * BATCH: NAN}):
        _, before, skipped, after = results
        assert math.isnan(skipped["metrics"]["loss"]) and skipped["metrics"]["skipped"] == 1.0
        assert skipped["metrics"]["anomaly/nonfinite_loss"] == 1.0
        assert_equal(updated(skipped["state"]), updated(before["state"]))
        assert (skipped["position"]["step"], skipped["position"]["consumed_samples"]) == (3, 3 * BATCH)
        assert after["metrics"]["lr"] < skipped["metrics"]["lr"] < before["metrics"]["lr"]  # the schedule goes on
        assert math.isfinite(after["metrics"]["loss"]) and after["metrics"]["skipped"] == 0.0


def test_a_skipped_batch_leaves_no_trace_in_running_statistics(pool: WorkerPool, settings: list[str]) -> None:
    overrides = [*settings, *PEER, "faults.on_nonfinite=skip"]
    (results,) = pool.run(1, train_step_by_step, overrides, 2, {BATCH: NAN})
    statistics = [name for name in results[0]["state"]["params"] if "running_" in name]
    assert statistics
    for name in statistics:
        np.testing.assert_array_equal(results[1]["state"]["params"][name], results[0]["state"]["params"][name])


def test_a_run_that_skips_ends_and_says_so_in_its_metrics(
    pool: WorkerPool, settings: list[str], tmp_path: Path
) -> None:
    spikes = ["faults.on_spike=skip", "faults.spike_window=3", "faults.spike_threshold=4"]
    overrides = [*settings, *spikes, "faults.on_nonfinite=skip", "train.steps=7", "checkpoint.interval=5"]
    factors = {4 * BATCH: -30.0, 5 * BATCH: NAN}
    for result in pool.run(2, train_whole, overrides, factors):
        assert result["error"] == "" and result["position"]["step"] == 7
    found = lines(tmp_path)
    assert [step for step in found if found[step]["skipped"]] == [5, 6]
    assert found[5]["anomaly/loss_spike"] == 1.0 and found[5]["loss"] > 1.2 * found[4]["loss"]
    assert found[6]["anomaly/nonfinite_loss"] == 1.0 and found[6]["loss"] is None
    # Resumed after the leap, with the losses before it, the run decides alike.
    (tmp_path / "checkpoints" / "step_00000007").rename(tmp_path / "first")
    for result in pool.run(2, train_whole, overrides, factors):
        assert result["error"] == "" and result["position"]["step"] == 7
    again = lines(tmp_path)
    assert [again[step]["loss"] for step in (6, 7)] == [found[step]["loss"] for step in (6, 7)]


def test_too_many_skips_in_a_row_end_the_run(pool: WorkerPool, settings: list[str]) -> None:
    overrides = [*settings, "faults.on_nonfinite=skip", "faults.max_skips=2"]
    factors = dict.fromkeys((BATCH, 3 * BATCH, 4 * BATCH, 5 * BATCH), NAN)
    for result in pool.run(2, train_whole, overrides, factors):
        assert "step 6: the loss is nan (rank " in result["error"]
        assert "; nothing was updated; the 2 steps before were skipped (faults.max_skips); " in result["error"]


@pytest.mark.parametrize("layout", ["dp2", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS)])
def test_a_rewound_run_goes_on_from_its_checkpoint_with_the_data_after_the_bad_batch(
    pool: WorkerPool, settings: list[str], tmp_path: Path, layout: str
) -> None:
    overrides = [*settings, "faults.on_nonfinite=rewind", "train.steps=6", *LAYOUTS.get(layout, [])]
    overrides += ["checkpoint.interval=2", "checkpoint.keep_last=0", "checkpoint.async_save=true"]
    rewound = pool.run(2, train_whole, overrides, {3 * BATCH: NAN})
    found = lines(tmp_path)
    assert found[2]["anomaly/nonfinite_loss"] == 1.0
    assert (found[2]["rewound_from"], found[2]["samples_passed_over"]) == (4.0, 2 * BATCH)
    assert found[2]["loss"] is not None and found[2]["skipped"] == 0.0
    assert sorted(found) == [1, 2, 3, 4, 5, 6] and not any(found[step]["skipped"] for step in found)
    # The same, by hand: the checkpoint of step 2, told that the data after it was read already.
    record = tmp_path / "checkpoints" / "step_00000002" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"consumed_samples": 4 * BATCH}))
    (record.parent / "SHA256SUMS").unlink()
    overrides += [f"checkpoint.load={record.parent}", f"checkpoint.dir={tmp_path / 'other'}"]
    by_hand = pool.run(2, train_whole, overrides, {})
    for result, expected in zip(rewound, by_hand, strict=True):
        assert result["error"] == "" and result["position"]["consumed_samples"] == 8 * BATCH
        assert result["position"] == expected["position"]
        assert_equal(result["state"], expected["state"])


def test_a_run_without_a_checkpoint_or_rewound_too_often_ends(pool: WorkerPool, settings: list[str]) -> None:
    overrides = [*settings, "faults.on_nonfinite=rewind", "checkpoint.interval=2", "faults.max_rewinds=1"]
    (result,) = pool.run(1, train_whole, overrides, {BATCH: NAN})
    assert "step 2: the loss is nan" in result["error"] and "there is no checkpoint to rewind to" in result["error"]
    (result,) = pool.run(1, train_whole, overrides, {3 * BATCH: NAN, 5 * BATCH: NAN})
    assert "step 4: the loss is nan" in result["error"]
    assert "the run was rewound 1 times (faults.max_rewinds); last good checkpoint: " in result["error"]
