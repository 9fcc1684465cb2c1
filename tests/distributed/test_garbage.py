"""Ranks look for garbage between steps, after the same ones, and train as they do without."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.training import loop
from tests.distributed.anomaly_job import replaced
from tests.distributed.test_moe import MODELS
from tests.distributed.workers import WorkerPool

STEPS = 5


def watched(overrides: list[str]) -> list[tuple[int, int, bool]]:
    """(generation, steps done, in the middle of a step) of every search for garbage from the first step on until the
    last is done, when torch looks for some before it saves."""
    found: list[tuple[int, int, bool]] = []
    done, inside = 0, False
    step = loop.train_step

    def counted(run: Any) -> Any:
        nonlocal done, inside
        inside = True
        metrics = step(run)
        done, inside = run.position.step, False
        return metrics

    def told(phase: str, info: dict[str, Any]) -> None:
        if phase == "start" and (inside or 0 < done < STEPS):
            found.append((info["generation"], done, inside))

    gc.callbacks.append(told)
    try:
        with replaced("train_step", counted), replaced("destroy_distributed", lambda: gc.callbacks.remove(told)):
            assert loop.train(load_config(None, overrides)) == 0
        assert gc.isenabled() and gc.get_freeze_count() == 0
    finally:
        loop.destroy_distributed()
    return found


@pytest.mark.parametrize("first", [0, 3], ids=["new", "resumed"])
def test_all_ranks_search_after_the_same_steps(
    pool: WorkerPool, small_run: list[str], tmp_path: Path, first: int
) -> None:
    def losses(folder: str, *settings: str) -> tuple[list[float], list[Any]]:
        run_dir = tmp_path / folder
        everything = [*small_run, *MODELS["losses"], f"train.run_dir={run_dir}", f"train.steps={STEPS}"]
        everything += ["logging.interval=1", "checkpoint.load=auto", *settings]
        if first:
            pool.run(2, watched, [*everything, f"train.exit_after_steps={first}"])
        found = pool.run(2, watched, everything)
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [record["loss"] for record in records if "loss" in record], found

    usual, found = losses("usual")
    assert all(any(inside for _, _, inside in searches) for searches in found)
    between, found = losses("between", "train.gc_interval=2")
    assert found == [[(2, step, False) for step in range(first + 1, STEPS + 1) if step % 2 == 0]] * 2
    assert between == usual and len(usual) == STEPS
