"""Tables read as E4M3 under layouts and placements, in checkpoints, evaluation and generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.checkpoint_job import train_and_save
from tests.distributed.layout_job import STEPS, assert_trains_like, train_job
from tests.distributed.test_memory_parallel import COLUMNS, MODELS, OVERLAP, P2, ROWS, TP2, TWO_LEVEL
from tests.distributed.workers import WorkerPool

FP8 = "model.memory.table_read=fp8"
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "rows_p2": (2, [P2, ROWS]),
    "columns_p2": (2, [P2, COLUMNS]),
    "dp2_overlap": (2, OVERLAP),
    "columns_tp2_overlap": (4, [P2, COLUMNS, TP2, *OVERLAP]),
    "two_level": (4, TWO_LEVEL),
}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=[] if name in ("rows_p2", "columns_p2", "dp2_overlap") else pytest.mark.slow)
        for name in LAYOUTS
    ],
)
def test_every_placement_reads_the_same_numbers(pool: WorkerPool, one_rank: Any, small_run: list[str], layout) -> None:
    ranks, settings = LAYOUTS[layout]
    expected = one_rank([*MODELS["ring"], FP8])
    assert_trains_like(expected, pool.run(ranks, train_job, [*small_run, *MODELS["ring"], FP8, *settings], STEPS, True))
    in_full = one_rank(MODELS["ring"])
    assert expected["losses"] != in_full["losses"]
    np.testing.assert_allclose(expected["losses"], in_full["losses"], rtol=5e-3)


@pytest.mark.parametrize(
    "settings",
    [
        ["train.precision=bf16"],
        pytest.param([P2, COLUMNS], marks=pytest.mark.slow),
        pytest.param(["optimizer.value_offload=torch"], marks=pytest.mark.slow),
    ],
    ids=["bf16", "columns", "offload"],
)
def test_resuming_is_bitwise_and_the_copy_is_not_saved(
    pool: WorkerPool, small_run: list[str], tmp_path: Path, settings: list[str]
) -> None:
    run = [*small_run, *MODELS["ring"], FP8, *settings, "checkpoint.load=auto", f"train.run_dir={tmp_path}"]
    ranks = 2 if P2 in settings else 1
    straight = pool.run(ranks, train_and_save, run, 4, (2,))
    resumed = pool.run(ranks, train_and_save, run, 4)
    for a, b in zip(resumed, straight, strict=True):
        assert a["first_step"] == 2
        for step in (3, 4):
            assert a["steps"][step] == b["steps"][step]
        for name, numbers in b["end"]["params"].items():
            assert np.array_equal(a["end"]["params"][name], numbers), name
            assert "codes" not in name and "scales" not in name


def first_logits(folder: Path, overrides: list[str]) -> np.ndarray:
    """After a prompt, of a checkpoint."""
    from megatron_ultramem.inference.model import load_model

    logits: np.ndarray = load_model(folder, overrides).logits(torch.arange(8).unsqueeze(0))[0].float().numpy()
    return logits


def test_generation_reads_as_training_did_unless_told_otherwise(
    pool: WorkerPool, small_run: list[str], tmp_path: Path
) -> None:
    run = [*small_run, *MODELS["ring"], FP8, f"checkpoint.dir={tmp_path}"]
    pool.run(1, train_and_save, run, 1, (1,))
    as_trained, in_full = (
        pool.run(1, first_logits, tmp_path / "step_00000001", overrides)[0]
        for overrides in ([], ["model.memory.table_read=params"])
    )
    assert not np.array_equal(as_trained, in_full)
    assert np.linalg.norm(as_trained - in_full) < 0.2 * np.linalg.norm(in_full)
