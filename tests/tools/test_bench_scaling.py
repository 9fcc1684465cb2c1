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


def test_first_ways_and_most_ranks_come_first() -> None:
    tool = script("bench_scaling")
    names = [case.name for case in tool.cases([1, 2, 4], None)]
    assert len(set(names)) == len(names)
    assert names[:3] == [f"{family.recipe}/{next(iter(family.ways))}_x4" for family in tool.FAMILIES]
    assert "ultramemv2_1b_7b/columns_x1" in names and "ultramemv2_1b_7b/columns_tp2_x1" not in names


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_every_case_of_a_whole_recipe_is_legal_and_fits_an_h200(ranks: int) -> None:
    tool = script("bench_scaling")
    args = argparse.Namespace(recipes=ROOT / "examples" / "configs", overrides=["data.paths=[unused]"])
    for case in tool.cases([ranks], None):
        if not case.family.cut:
            assert tool.plan_of(args, case, load_cluster("h200"))[1].fits, case.name


def test_a_cut_model_has_the_most_layers_that_fit() -> None:
    tool = script("bench_scaling")
    args = argparse.Namespace(recipes=ROOT / "examples" / "configs", overrides=["data.paths=[unused]"])
    (case,) = [case for case in tool.cases([2], ["rows"]) if case.family.cut]
    settings, plan = tool.plan_of(args, case, load_cluster("h200"))
    layers = plan.config.model.num_layers
    assert plan.fits and layers < 32 and settings[-1] == f"model.num_layers={layers}"
    deeper = tool.load_config(case.path(args.recipes), [*settings, f"model.num_layers={layers + 4}"])
    assert not tool.evaluate(deeper, 2, load_cluster("h200")).fits


def test_efficiency_is_against_the_fewest_ranks_and_speed_against_the_best_moe() -> None:
    tool = script("bench_scaling")
    speeds = {"ultramemv2_1b_7b/rows_x1": 10.0, "ultramemv2_1b_7b/rows_x4": 36.0, "olmoe_1b_7b/moe_x4": 9.0,
              "olmoe_1b_7b/moe_tp2_x4": 12.0}  # fmt: skip
    found = tool.compared([Row(case, "tokens_per_s", value, "") for case, value in speeds.items()])
    values = {(row.case, row.metric): row.value for row in found}
    assert values == {
        ("ultramemv2_1b_7b/rows_x4", "scaling_efficiency_percent"): pytest.approx(90.0),
        ("ultramemv2_1b_7b/rows_x4", "times_the_moe"): pytest.approx(3.0),
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ways=other"], "--ways other: legal: columns, rows"),
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
    for recipe, model in (("ultramemv2_1b_7b", MEMORY), ("olmoe_1b_7b", MOE), ("ultramemv2_2_5b_120b_top256", MEMORY)):
        (tmp_path / f"{recipe}.yaml").write_text(TINY.format(model=model))
    options = [f"--recipes={tmp_path}", f"--output={tmp_path}", "--cluster=h100", "--ranks=2"]
    options += ["--ways=rows,columns_tp2,moe_tp2", f"data.paths=[{corpus}]"]
    options += ["parallel.exchange_capacity=null", "train.cuda_graphs=none"]
    assert tool.main(options) == 0
    (written,) = tmp_path.glob("scaling_*.json")
    values = {(row["case"], row["metric"]): row["value"] for row in json.loads(written.read_text())["rows"]}
    for case in ("ultramemv2_1b_7b/columns_tp2_x2", "olmoe_1b_7b/moe_tp2_x2", "ultramemv2_2_5b_120b_top256/rows_x2"):
        assert values[case, "tokens_per_s"] > 0 and values[case, "predicted_step_ms"] > 0
    assert values["ultramemv2_2_5b_120b_top256/rows_x2", "layers"] == 2
    assert values["ultramemv2_1b_7b/columns_tp2_x2", "times_the_moe"] > 0
    assert "ultramemv2_1b_7b/rows_x2" in capsys.readouterr().out  # the preset is for GPUs: left out, and said so
