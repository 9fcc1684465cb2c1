"""Checkpoints are free of the placement: saved under one, loaded under another, optimizer state included, bitwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.checkpoint_job import shards_and_losses, train_and_save
from tests.distributed.layout_job import assemble
from tests.distributed.test_memory_parallel import COLUMNS, EP2, MODELS, P2, P4, PLAIN, PP2, ROWS, TP2, TWO_LEVEL
from tests.distributed.workers import WorkerPool

LAYOUTS = {
    "one": (1, []),
    "plain_one": (1, [PLAIN]),
    "dp2": (2, []),
    "rows_p2": (2, [P2, ROWS]),
    "rows_p4": (4, [P4, ROWS]),
    "rows_p2_tp2": (2, [P2, ROWS, TP2]),
    "rows_p2_dp2": (4, [P2, ROWS]),
    "columns_p2": (2, [P2, COLUMNS]),
    "columns_p4": (4, [P4, COLUMNS]),
    "columns_p2_pp2": (4, [P2, COLUMNS, PP2]),
    "plain_rows_p4": (4, [P4, ROWS, PLAIN]),
    "plain_columns_p2": (2, [P2, COLUMNS, PLAIN]),
    "two_level": (4, TWO_LEVEL),
    "rows_ep2": (2, [P2, ROWS, EP2]),
    "columns_ep2": (2, [P2, COLUMNS, EP2]),
}
FAST = [("ring", "rows_p2", "columns_p2")]
SLOW = [
    ("ring", "rows_p4", "columns_p2"),
    ("ring", "columns_p2", "one"),
    ("block", "columns_p2_pp2", "rows_p2_tp2"),
    ("ring", "plain_rows_p4", "plain_columns_p2"),
    ("ring", "one", "rows_p4"),
    ("ring", "rows_p4", "one"),
    ("ring", "plain_one", "plain_columns_p2"),
    ("ring", "plain_rows_p4", "plain_one"),
    ("block", "dp2", "columns_p4"),
    ("ring", "rows_p2_dp2", "two_level"),
    ("ring", "two_level", "rows_p2"),
    ("moe", "rows_ep2", "columns_ep2"),
    ("moe", "columns_ep2", "one"),
    ("moe", "one", "rows_ep2"),
]


@pytest.mark.parametrize(
    ("model", "source", "target"),
    [
        pytest.param(*case, id="{}-{}-to-{}".format(*case), marks=[] if case in FAST else pytest.mark.slow)
        for case in FAST + SLOW
    ],
)
def test_a_checkpoint_moves_between_placements(
    pool: WorkerPool, small_run: list[str], tmp_path: Path, model: str, source: str, target: str
) -> None:
    settings = [*small_run, *MODELS[model], f"checkpoint.dir={tmp_path}"]
    ranks, layout = LAYOUTS[source]
    saved = pool.run(ranks, shards_and_losses, [*settings, *layout], 2, True)
    expected = assemble([result["end"] for result in saved])
    settings.append(f"checkpoint.load={tmp_path / 'step_00000002'}")

    ranks, layout = LAYOUTS[target]
    results = pool.run(ranks, shards_and_losses, [*settings, *layout], 4)
    loaded = assemble([result["start"] for result in results])
    assert loaded.keys() == expected.keys()
    assert any(key.endswith("exp_avg_sq.decoder.pools.0.pre_values") for key in expected)
    for key, wanted in expected.items():
        np.testing.assert_array_equal(loaded[key], wanted, err_msg=key)

    ranks, layout = LAYOUTS[source]
    (straight, *_) = pool.run(ranks, shards_and_losses, [*settings, *layout], 4)
    for result in results:
        assert result["first_step"] == 2
        np.testing.assert_allclose(result["losses"], straight["losses"], rtol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rows_p2", "columns_p2"])
def test_a_resumed_run_continues_bitwise(pool: WorkerPool, small_run: list[str], tmp_path: Path, layout: str) -> None:
    ranks, settings = LAYOUTS[layout]
    settings = [*small_run, *MODELS["ring"], *settings, f"checkpoint.dir={tmp_path}", "model.hidden_dropout=0.1"]
    straight = pool.run(ranks, train_and_save, settings, 4, (2,))
    settings.append(f"checkpoint.load={tmp_path / 'step_00000002'}")
    for resumed, whole in zip(pool.run(ranks, train_and_save, settings, 4), straight, strict=True):
        assert resumed["first_step"] == 2
        assert [resumed["steps"][step]["loss"] for step in (3, 4)] == [whole["steps"][step]["loss"] for step in (3, 4)]
        for part in ("params", "optimizer"):
            assert resumed["end"][part].keys() == whole["end"][part].keys()
            for name, numbers in whole["end"][part].items():
                np.testing.assert_array_equal(resumed["end"][part][name], numbers, err_msg=name)
