"""tools/bench_scaling.py: recipes on growing numbers of ranks, and the planner's word beside each figure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from megatron_ultramem.planning.clusters import load_cluster
from megatron_ultramem.results import Row
from tests.distributed.conftest import corpus  # noqa: F401
from tests.tools.scripts import script

ROOT = Path(__file__).parents[2]
TINY = """
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, ffn_hidden_size: 64, max_sequence_length: 32,
  vocab_size: 260, {model}}}
data: {{sequence_length: 32}}
train: {{micro_batch_size: 1, global_batch_size: 16, precision: fp32, device: cpu}}
logging: {{tensorboard: false, progress: false}}
"""
MEMORY = "memory: {num_keys: 12, key_dim: 8, top_m: 6, value_dim: 64, pre_value_dim: 64}"
MOE = "memory: {layers: none}, moe: {layers: all, num_experts: 4, top_k: 2, ffn_hidden_size: 32}"


def test_the_most_important_cases_come_first() -> None:
    tool = script("bench_scaling")
    names = [case.name for case in tool.cases([1, 2, 4], None)]
    assert len(set(names)) == len(names)
    goals = [f"{tool.MEMORY}/columns_x4", f"{tool.MEMORY}/columns_x1", f"{tool.MOE}/moe_x4", f"{tool.MOE}/moe_x1"]
    assert set(goals) <= set(names[:6]) and names[0] == goals[0]
    assert not {f"{tool.MEMORY}/columns_tp2_x1", f"{tool.MOE}/moe_pp2_x1"} & set(names)
    assert names.index(f"{tool.MEMORY}/columns_pp2_x2") < names.index(f"{tool.MEMORY}/columns_pp2_x4")


def arguments() -> argparse.Namespace:
    return argparse.Namespace(recipes=ROOT / "examples" / "configs", overrides=["data.paths=[unused]"])


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_cases_of_whole_recipes_are_legal_and_fit_an_h200(ranks: int) -> None:
    tool = script("bench_scaling")
    whole = [case for case in tool.cases([ranks], None) if case.way.cut is None]
    too_large = [case.name for case in whole if not tool.plan_of(arguments(), case, load_cluster("h200"))[1].fits]
    assert too_large == ([f"{tool.MOE}/moe_fp8_x1"] if ranks == 1 else [])  # experts in FP8 beside those in bf16


def test_a_cut_model_has_the_most_layers_that_fit() -> None:
    tool, cluster = script("bench_scaling"), load_cluster("h200")
    (two,) = (case for case in tool.cases([2], ["cut_columns"]))
    settings, plan = tool.plan_of(arguments(), two, cluster)
    layers = plan.config.model.num_layers
    assert plan.fits and layers < 32 and settings[-1] == f"model.num_layers={layers}"
    deeper = tool.load_config(two.path(arguments().recipes), [*settings, f"model.num_layers={layers + 4}"])
    assert not tool.evaluate(deeper, 2, cluster).fits
    (four,) = (case for case in tool.cases([4], ["cut_of_2_columns"]))
    assert tool.plan_of(arguments(), four, cluster)[0][-1] == settings[-1]


def test_cases_that_come_to_the_same_are_known_to_be_the_same() -> None:
    tool, cluster = script("bench_scaling"), load_cluster("h200")
    found = {
        case.name.partition("/")[2]: tool._planned(arguments(), case, cluster).identity
        for case in tool.cases([1, 4], ["columns", "rows", "auto", "columns_overlap", "columns_fp8"])
    }
    assert len({found[f"{way}_x1"] for way in ("columns", "rows", "auto", "columns_overlap")}) == 1
    assert found["columns_fp8_x1"] != found["columns_x1"]
    assert len({found[f"{way}_x4"] for way in ("columns", "rows", "columns_overlap", "columns_fp8")}) == 4
    assert found["auto_x4"] == found["columns_x4"]


def test_efficiency_is_against_the_fewest_ranks_and_speed_against_the_best_moe() -> None:
    tool = script("bench_scaling")
    speeds = {
        f"{tool.MEMORY}/rows_x1": 10.0, f"{tool.MEMORY}/rows_x4": 36.0, f"{tool.MOE}/moe_x4": 9.0,
        f"{tool.MOE}/moe_tp2_x4": 12.0, f"{tool.LARGE}/cut_rows_x2": 5.0, f"{tool.LARGE}/cut_rows_x4": 5.0,
        f"{tool.LARGE}/cut_of_2_columns_x2": 5.0, f"{tool.LARGE}/cut_of_2_columns_x4": 8.0,
    }  # fmt: skip
    rows = [Row(case, "tokens_per_s", value, "") for case, value in speeds.items()]
    rows += [Row(f"{tool.MEMORY}/rows_x{ranks}", "tokens_per_s_with_optimizer", 2.0 * ranks, "") for ranks in (1, 4)]
    rows.append(Row(f"{tool.LARGE}/cut_rows_x1", "fits", 0.0, ""))
    values = {(row.case, row.metric): row.value for row in tool.compared(rows)}
    assert values == {
        (f"{tool.MEMORY}/rows_x4", "scaling_efficiency_percent"): pytest.approx(90.0),
        (f"{tool.MEMORY}/rows_x4", "step_scaling_efficiency_percent"): pytest.approx(100.0),
        (f"{tool.MEMORY}/rows_x4", "times_the_moe"): pytest.approx(3.0),
        (f"{tool.LARGE}/cut_of_2_columns_x4", "scaling_efficiency_percent"): pytest.approx(80.0),
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ways=other"], "--ways other: legal: columns, moe"),
        (["--ranks=two"], "--ranks two: legal: numbers"),
        (["--cluster=mine"], "--cluster mine: unknown"),
    ],
)
def test_refused_before_anything_runs(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("bench_scaling").main(["--cluster=h100", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_it_measures_on_ranks_of_its_own(
    corpus: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool = script("bench_scaling")
    for recipe, model in ((tool.MEMORY, MEMORY), (tool.MOE, MOE), (tool.LARGE, MEMORY)):
        (tmp_path / f"{recipe}.yaml").write_text(TINY.format(model=model))
    options = [f"--recipes={tmp_path}", f"--output={tmp_path}", "--cluster=h100", "--ranks=1,2"]
    options += ["--ways=columns,columns_overlap,columns_tp2,moe,moe_tp2,cut_columns", f"data.paths=[{corpus}]"]
    # What the preset and the fusion change is for GPUs; the router's fusion stays, and fails.
    options += ["train.cuda_graphs=none", "train.cross_entropy=megatron", "train.norms=backend"]
    assert tool.main([*options, "train.fused_weight_gradients=false"]) == 0
    (written,) = tmp_path.glob("scaling_*.json")
    values = {(row["case"], row["metric"]): row["value"] for row in json.loads(written.read_text())["rows"]}
    for case in (f"{tool.MEMORY}/columns_x1", f"{tool.MEMORY}/columns_tp2_x2", f"{tool.LARGE}/cut_columns_x2"):
        assert values[case, "tokens_per_s"] > 0 and values[case, "predicted_step_ms"] > 0
    assert values[f"{tool.LARGE}/cut_columns_x2", "layers"] == 2
    assert values[f"{tool.MEMORY}/columns_x2", "scaling_efficiency_percent"] > 0
    # One rank has nothing to overlap: not measured again.
    same = (values[f"{tool.MEMORY}/{way}_x1", "step_ms"] for way in ("columns", "columns_overlap"))
    assert len(set(same)) == 1
    said = capsys.readouterr().out
    assert f"{tool.MOE}/moe_x2 failed" in said and "router_fusion" in said  # costs the others nothing
