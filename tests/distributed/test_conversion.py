"""A checkpoint of any layout becomes a Hugging Face folder, and that a checkpoint which any other layout trains on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ultramem.cli import main
from megatron_ultramem.config import load_config
from tests.distributed.checkpoint_job import shards_and_losses
from tests.distributed.layout_job import assemble, shards
from tests.distributed.test_memory_parallel import COLUMNS, EP2, MODELS, P2, PP2, ROWS, TP2, TWO_LEVEL
from tests.distributed.workers import WorkerPool

LAYOUTS = {
    "one": (1, []),
    "tp2_pp2": (4, [TP2, PP2]),
    "rows_p2_tp2": (2, [P2, ROWS, TP2]),
    "columns_p2_pp2": (4, [P2, COLUMNS, PP2]),
    "two_level": (4, TWO_LEVEL),
    "rows_ep2": (2, [P2, ROWS, EP2]),
    "columns_ep2": (2, [P2, COLUMNS, EP2]),
}
FAST = [("block", "rows_p2_tp2", "columns_p2_pp2")]
SLOW = [
    ("block", "columns_p2_pp2", "tp2_pp2"),
    ("block", "tp2_pp2", "one"),
    ("ring", "two_level", "rows_p2_tp2"),
    ("moe", "columns_ep2", "rows_ep2"),
    ("moe", "rows_ep2", "one"),
]


def weights_and_a_step(overrides: list[str]) -> dict[str, Any]:
    """This rank's shards of the model as it was loaded, and the loss of a step from there."""
    from megatron_ultramem.training.loop import train_step
    from megatron_ultramem.training.setup import set_up

    run = set_up(load_config(None, overrides))
    return {"weights": shards(run), "loss": train_step(run)["loss"]}


@pytest.mark.parametrize(
    ("model", "source", "target"),
    [
        pytest.param(*case, id="{}-{}-to-{}".format(*case), marks=[] if case in FAST else pytest.mark.slow)
        for case in FAST + SLOW
    ],
)
def test_weights_pass_through_hugging_face_from_layout_to_layout(
    pool: WorkerPool,
    small_run: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    source: str,
    target: str,
) -> None:
    settings = [*small_run, *MODELS[model]]
    ranks, layout = LAYOUTS[source]
    saved = pool.run(ranks, shards_and_losses, [*settings, *layout, f"checkpoint.dir={tmp_path / 'ours'}"], 2, True)
    expected = assemble([result["end"] for result in saved])

    for arguments in (["to-hf", tmp_path / "ours", tmp_path / "hf"], ["from-hf", tmp_path / "hf", tmp_path / "back"]):
        assert main(["convert", *map(str, arguments)]) == 0, capsys.readouterr()

    ranks, layout = LAYOUTS[target]
    settings += [f"checkpoint.load={tmp_path / 'back'}", "checkpoint.load_optimizer=false"]
    results = pool.run(ranks, weights_and_a_step, [*settings, *layout, f"checkpoint.dir={tmp_path / 'new'}"])
    loaded = assemble([result["weights"] for result in results])
    assert loaded.keys() == {name for name in expected if not name.startswith("optimizer")}
    for name, tensor in loaded.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
    assert all(np.isfinite(result["loss"]) for result in results)
