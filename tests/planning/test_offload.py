"""Predictions for tables whose optimizer lives in host memory, against benchmarks/results/offload_h100.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.planning.clusters import load_cluster
from megatron_ultramem.planning.evaluate import Evaluation, Evaluator, on_cluster
from megatron_ultramem.planning.memory import GIB

ROOT = Path(__file__).resolve().parents[2]
MICRO_BATCHES = 8
LARGE = "model.memory.num_keys=804"  # what tools/bench_offload.py takes for 80 GB


def measured() -> dict[str, dict[str, float]]:
    """By case and metric."""
    found: dict[str, dict[str, float]] = {}
    for row in json.loads((ROOT / "benchmarks" / "results" / "offload_h100.json").read_text())["rows"]:
        found.setdefault(row["case"], {})[row["metric"]] = row["value"]
    return found


def predicted(offload: str, *settings: str) -> Evaluation:
    """For the recipe that was measured, on one H100."""
    recipe = ROOT / "examples" / "configs" / "ultramemv2_227m_1b.yaml"
    overrides = [f"train.global_batch_size={4 * MICRO_BATCHES}", f"optimizer.value_offload={offload}", *settings]
    cluster = load_cluster("h100")
    config = on_cluster(load_config(recipe, overrides), cluster)
    return Evaluator(config, config.model.vocab_size or 0, cluster).evaluate(config, 1)


@pytest.mark.parametrize(
    ("case", "offload", "settings"),
    [("on_device", "none", []), ("deepspeed", "deepspeed", []), ("too_large_deepspeed", "deepspeed", [LARGE])],
)
def test_the_peak_is_predicted(case: str, offload: str, settings: list[str]) -> None:
    """The last one's is that of building its optimizer."""
    memory = predicted(offload, *settings).memory
    assert memory.peak / GIB == pytest.approx(measured()[case]["peak_gib"], rel=0.01)
    assert (memory.set_up > 0) == bool(settings)


def test_the_cost_of_the_update_on_the_host_is_predicted() -> None:
    found = measured()
    cost = (found["deepspeed"]["step_ms"] - found["on_device"]["step_ms"]) / 1e3
    times = [predicted(offload).time.times.optimizer for offload in ("none", "deepspeed")]
    assert times[1] - times[0] == pytest.approx(cost, rel=0.3)


def test_a_table_that_ran_out_of_memory_is_predicted_to_fit_only_with_its_optimizer_on_the_host() -> None:
    assert measured()["too_large_on_device"]["trains"] == 0
    assert measured()["too_large_deepspeed"]["trains"] == 1
    assert not predicted("none", LARGE).fits and predicted("deepspeed", LARGE).fits
