"""tools/bench_baselines.py: every recipe in several ways, the fastest of which is its case."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ultramem.results import Row, write_results
from tests.tools.scripts import script

ROOT = Path(__file__).parents[2]
TINY = """
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, ffn_hidden_size: 64, max_sequence_length: 32, {model}}}
data: {{sequence_length: 32}}
train: {{micro_batch_size: 1, global_batch_size: 16, precision: fp32}}
logging: {{tensorboard: false}}
"""
MOE = "memory: {layers: none}, moe: {layers: all, num_experts: 4, top_k: 2, ffn_hidden_size: 32}"


def test_every_recipe_is_there_and_its_first_way_is_tried_first() -> None:
    tool = script("bench_baselines")
    for recipe in tool.WAYS:
        assert (ROOT / "examples" / "configs" / f"{recipe}.yaml").exists()
    cases = tool._cases("*", None)
    assert len(cases) == len(set(cases)) == sum(not w.startswith("mcore") for ways in tool.WAYS.values() for w in ways)
    assert {recipe for recipe, _ in cases[: len(tool.WAYS)]} == set(tool.WAYS)
    assert ("olmoe_227m_1b", "mcore_router_fusion") in tool._cases("olmoe*", ROOT)


def test_the_fastest_way_is_the_case_of_its_recipe() -> None:
    tool = script("bench_baselines")

    def rows(speed: float, peak: float) -> list[Row]:
        return [Row("dense", "tokens_per_s", speed, ""), Row("dense", "peak_gib", peak, "GiB")]

    found = tool.results({"dense": {"plain": rows(5.0, 1.0), "graphs": rows(7.0, 2.0)}, "moe": {}})
    values = {(row.case, row.metric): row.value for row in found}
    assert (values["dense", "tokens_per_s"], values["dense", "peak_gib"]) == (7.0, 2.0)
    assert values["dense/plain", "tokens_per_s"] == 5.0 and values["dense/graphs", "peak_gib"] == 2.0
    assert {row.case for row in found} == {"dense", "dense/plain", "dense/graphs"}


def test_other_figures_of_a_case_stay(tmp_path: Path) -> None:
    write_results(tmp_path, "training", [Row("a", "loss", 3.0, ""), Row("a", "speed", 1.0, ""), Row("b", "x", 2.0, "")])
    written = write_results(tmp_path, "training", [Row("a", "speed", 4.0, "")], keep_other_metrics=True)
    rows = {(row["case"], row["metric"]): row["value"] for row in json.loads(written.read_text())["rows"]}
    assert rows == {("a", "loss"): 3.0, ("b", "x"): 2.0, ("a", "speed"): 4.0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--cases=other"], "--cases other: legal: ultramemv2_227m_1b/throughput"), (["--mcore=."], "--mcore .: legal")],
)
def test_refused_before_anything_runs(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("bench_baselines").main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_way_that_cannot_run_costs_the_others_nothing(tmp_path: Path) -> None:
    (tmp_path / "dense_227m.yaml").write_text(TINY.format(model="memory: {layers: none}"))
    (tmp_path / "olmoe_227m_1b.yaml").write_text(TINY.format(model=MOE))
    command = [sys.executable, str(ROOT / "tools" / "bench_baselines.py"), f"--recipes={tmp_path}"]
    cases = "dense_227m/plain,olmoe_227m_1b/router_fusion,olmoe_227m_1b/plain"
    done = subprocess.run(
        [*command, f"--cases={cases}", f"--output={tmp_path}/out"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "olmoe_227m_1b/router_fusion did not run:" in done.stdout  # the fusion needs Transformer Engine
    (written,) = (tmp_path / "out").glob("training_*.json")
    rows = {(row["case"], row["metric"]): row["value"] for row in json.loads(written.read_text())["rows"]}
    assert {case for case, _ in rows} == {"dense_227m", "dense_227m/plain", "olmoe_227m_1b", "olmoe_227m_1b/plain"}
    for recipe in ("dense_227m", "olmoe_227m_1b"):
        assert rows[recipe, "tokens_per_s"] == rows[f"{recipe}/plain", "tokens_per_s"] > 0
        assert rows[recipe, "tokens_per_s_with_optimizer"] > 0 and rows[recipe, "tflops"] > 0
