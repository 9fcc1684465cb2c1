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


def test_what_matters_most_is_measured_first() -> None:
    tool = script("bench_baselines")
    for recipe in tool.WAYS:
        assert (ROOT / "examples" / "configs" / f"{recipe}.yaml").exists()
    cases = tool._cases("*", None)
    assert (
        len(cases)
        == len(set(cases))
        == sum(not way.other_mcore for ways in tool.WAYS.values() for way in ways.values())
    )
    first = cases[: len(tool.WAYS)]
    assert {recipe for recipe, _ in first} == set(tool.WAYS)
    assert all(tool.PRESET in tool.WAYS[recipe][way].settings for recipe, way in first)
    every = tool._cases("*", ROOT)
    of_the_moe = [case for case in every[len(first) :] if case[0] == tool.MOE]
    assert every[len(first) : len(first) + len(of_the_moe) - 1] == of_the_moe[:-1] and of_the_moe[-1][1] == "plain"


def test_ways_of_one_environment_stand_together() -> None:
    tool = script("bench_baselines")
    ways = [tool.WAYS[recipe][way] for recipe, way in tool._cases("*", ROOT)]
    starts = [
        way
        for way, before in zip(ways, [None, *ways], strict=False)
        if not before or not way.shares_process_with(before)
    ]
    assert len(starts) == 5  # ours, by CUTLASS, the other Megatron-Core's by CUTLASS and without, ours


def test_the_fastest_way_is_the_case_of_its_recipe() -> None:
    tool = script("bench_baselines")

    def rows(speed: float, peak: float) -> list[Row]:
        return [Row("dense", "tokens_per_s", speed, ""), Row("dense", "peak_gib", peak, "GiB")]

    found = tool.results({"dense": {"plain": rows(5.0, 1.0), "graphs": rows(7.0, 2.0)}, "moe": {}})
    values = {(row.case, row.metric): row.value for row in found}
    assert (values["dense", "tokens_per_s"], values["dense", "peak_gib"]) == (7.0, 2.0)
    assert values["dense/plain", "tokens_per_s"] == 5.0 and values["dense/graphs", "peak_gib"] == 2.0
    assert {row.case for row in found} == {"dense", "dense/plain", "dense/graphs"}


def test_ways_that_were_measured_before_count_too(tmp_path: Path) -> None:
    tool = script("bench_baselines")

    def rows(speed: float) -> list[Row]:
        return [Row(tool.MOE, "tokens_per_s", speed, "tokens/s")]

    write_results(tmp_path, "training", tool.results({tool.MOE: {"preset": rows(7.0), "plain": rows(9.0)}}))
    found = {tool.MOE: {}}
    tool._find_again(tmp_path, found, [(tool.MOE, "plain")])
    assert found == {tool.MOE: {"preset": rows(7.0)}}
    written = write_results(tmp_path, "training", tool.results({tool.MOE: {**found[tool.MOE], "plain": rows(5.0)}}))
    now = {row["case"]: row["value"] for row in json.loads(written.read_text())["rows"]}
    assert now == {tool.MOE: 7.0, f"{tool.MOE}/preset": 7.0, f"{tool.MOE}/plain": 5.0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--cases=other"], "--cases other: legal: ultramemv2_227m_1b/preset"), (["--mcore=."], "--mcore .: legal")],
)
def test_refused_before_anything_runs(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("bench_baselines").main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_way_that_cannot_run_costs_the_others_nothing(tmp_path: Path) -> None:
    (tmp_path / "dense_227m.yaml").write_text(TINY.format(model="memory: {layers: none}"))
    (tmp_path / "olmoe_227m_1b.yaml").write_text(TINY.format(model=MOE))
    command = [sys.executable, str(ROOT / "tools" / "bench_baselines.py"), f"--recipes={tmp_path}"]
    cases = "dense_227m/plain,olmoe_227m_1b/preset_no_router_fusion,olmoe_227m_1b/plain,ultramem*/plain"
    done = subprocess.run(
        [*command, f"--cases={cases}", f"--output={tmp_path}/out"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "olmoe_227m_1b/preset_no_router_fusion did not run:" in done.stdout  # the preset needs Transformer Engine
    assert "ultramemv2_227m_1b/plain did not run:" in done.stdout  # there is no such recipe
    assert "ultramemv2_227m_1b.yaml" in done.stdout
    (written,) = (tmp_path / "out").glob("training_*.json")
    rows = {(row["case"], row["metric"]): row["value"] for row in json.loads(written.read_text())["rows"]}
    assert {case for case, _ in rows} == {"dense_227m", "dense_227m/plain", "olmoe_227m_1b", "olmoe_227m_1b/plain"}
    for recipe in ("dense_227m", "olmoe_227m_1b"):
        assert rows[recipe, "tokens_per_s"] == rows[f"{recipe}/plain", "tokens_per_s"] > 0
        assert rows[recipe, "tokens_per_s_with_optimizer"] > 0 and rows[recipe, "tflops"] > 0


@pytest.mark.slow
def test_a_way_that_does_not_come_near_the_fastest_has_no_step(tmp_path: Path) -> None:
    (tmp_path / "dense_227m.yaml").write_text(TINY.format(model="memory: {layers: none}"))
    text = script("bench_baselines")._text(tmp_path / "text")
    plan = [
        {
            "recipe": str(tmp_path / "dense_227m.yaml"),
            "settings": [f"train.run_dir={tmp_path}", *text],
            "beat": beat,
            "output": str(tmp_path / f"{beat}.json"),
        }
        for beat in (1.0, 1e9)  # in this order: the second has the speed of the first to beat too
    ]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, str(ROOT / "tools" / "bench_baselines.py"), f"--child={tmp_path / 'plan.json'}"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    slow, fast = ({row["metric"] for row in json.loads((tmp_path / f"{beat}.json").read_text())} for beat in (1e9, 1.0))
    assert fast - slow == {"tokens_per_s_with_optimizer", "step_ms"} and not slow - fast


def test_no_case_begins_when_the_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cases=dense*", "--limit=0", f"--output={tmp_path}"]
    assert script("bench_baselines").main(arguments) == 2
    said = capsys.readouterr()
    assert "not measured, as the time is over: dense_227m/preset, dense_227m/plain" in said.out
    assert "no case ran" in said.err
