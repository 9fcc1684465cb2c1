"""tools/bench_scaling.py: recipes on growing numbers of ranks, and the planner's word beside each figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ultramem.planning import scaling
from megatron_ultramem.planning.clusters import load_cluster
from tests.distributed.conftest import corpus  # noqa: F401
from tests.tools.scripts import script

RECIPES = Path(__file__).parents[2] / "examples" / "configs"
TINY = """
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, ffn_hidden_size: 64, max_sequence_length: 32,
  vocab_size: 260, {model}}}
data: {{sequence_length: 32}}
train: {{micro_batch_size: 1, global_batch_size: 16, precision: fp32, device: cpu}}
logging: {{tensorboard: false, progress: false}}
"""
MEMORY = "memory: {num_keys: 12, key_dim: 8, top_m: 6, value_dim: 64, pre_value_dim: 64}"
MOE = "memory: {layers: none}, moe: {layers: all, num_experts: 4, top_k: 2, ffn_hidden_size: 32}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ways=other"], "--ways other: legal: columns, "),
        (["--ranks=two"], "--ranks two: legal: numbers"),
        (["--cluster=mine"], "--cluster mine: unknown"),
        (["--again=none.json"], "--again none.json: there is no such file"),
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
    for recipe, model in ((scaling.MEMORY, MEMORY), (scaling.MOE, MOE), (scaling.LARGE, MEMORY)):
        (tmp_path / f"{recipe}.yaml").write_text(TINY.format(model=model))
    options = [f"--recipes={tmp_path}", f"--output={tmp_path}", "--cluster=h100", "--ranks=1,2"]
    options += [
        "--ways=columns,columns_overlap,columns_tp2,columns_pp2,moe,moe_tp2,cut_columns",
        f"data.paths=[{corpus}]",
    ]
    # What the preset and the fusion change is for GPUs; the router's fusion stays, and fails.
    options += ["train.cuda_graphs=none", "train.cross_entropy=megatron", "train.norms=backend"]
    assert tool.main([*options, "train.fused_weight_gradients=false"]) == 0
    (written,) = tmp_path.glob("scaling_*.json")
    rows = json.loads(written.read_text())["rows"]
    values = {(row["case"], row["metric"]): row["value"] for row in rows}
    for way, ranks in (("columns", 1), ("columns", 2), ("columns_tp2", 2), ("columns_pp2", 2)):
        case = f"{scaling.MEMORY}/{way}_x{ranks}"
        tokens = values[case, "tokens_per_s_with_optimizer"] * values[case, "step_ms"] / 1e3
        assert tokens == pytest.approx(scaling.MICRO_BATCHES * ranks * 32), case
    against = {
        row["case"].partition("/")[2]: row["unit"] for row in rows if row["metric"] == "scaling_efficiency_percent"
    }
    assert against["columns_x2"] == "% of x1"
    assert against["columns_tp2_x2"] == against["columns_pp2_x2"] == "% of columns_x1"
    for case in (f"{scaling.MEMORY}/columns_x1", f"{scaling.MEMORY}/columns_tp2_x2", f"{scaling.LARGE}/cut_columns_x2"):
        assert values[case, "step_ms_spread_percent"] > 0 and values[case, "tokens_per_s_spread_percent"] > 0
        assert values[case, "tokens_per_s"] > 0 and values[case, "predicted_step_ms"] > 0
    assert values[f"{scaling.LARGE}/cut_columns_x2", "layers"] == 2
    assert values[f"{scaling.MEMORY}/columns_x2", "scaling_efficiency_percent"] > 0
    # One rank has nothing to overlap: not measured again.
    same = (values[f"{scaling.MEMORY}/{way}_x1", "step_ms"] for way in ("columns", "columns_overlap"))
    assert len(set(same)) == 1
    said = capsys.readouterr().out
    assert f"{scaling.MOE}/moe_x2 failed" in said and "router_fusion" in said  # costs the others nothing


def test_what_was_measured_is_predicted_anew(tmp_path: Path) -> None:
    tool, name = script("bench_scaling"), f"{scaling.LARGE}/cut_columns_x2"
    figures = {"step_ms": 1000.0, "predicted_step_ms": 5.0, "layers": 4.0, "tokens_per_s": 7.0}
    rows = [{"case": name, "metric": metric, "value": value, "unit": "u"} for metric, value in figures.items()]
    rows.append({"case": "gone/way_x2", "metric": "step_ms", "value": 3.0, "unit": "ms"})
    path = tmp_path / "scaling_h200x2.json"
    path.write_text(json.dumps({"benchmark": "scaling", "commit": "abc", "rows": rows}))
    assert tool.main(["--cluster=h200", f"--again={path}"]) == 0
    content = json.loads(path.read_text())
    values = {(row["case"], row["metric"]): row["value"] for row in content["rows"]}
    predicted = values[name, "predicted_step_ms"]
    assert predicted > 100 and values[name, "step_error_percent"] == pytest.approx(100 * (predicted / 1000 - 1))
    assert (values[name, "tokens_per_s"], values["gone/way_x2", "step_ms"]) == (7.0, 3.0)
    assert content["commit"] == "abc" and content["predicted_at"]


def test_variables_of_a_way_are_set_where_the_environment_has_them_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, cluster = script("bench_scaling"), load_cluster("h200")
    (case,) = scaling.cases([2], ["cut_columns"])
    planned = scaling.Planned(case, *scaling.plan_of(RECIPES, [scaling.UNUSED_DATA], case, cluster))
    args = tool._arguments([scaling.UNUSED_DATA])
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "NCCL_GRAPH_REGISTER", "NCCL_NVLS_ENABLE", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "99")  # cores are dealt out all the same
    environment = tool._job(args, planned, tmp_path, 2).environment
    assert environment.pop("OMP_NUM_THREADS") != "99"
    assert environment == {**dict(scaling.NO_PIECES), "NCCL_NVLS_ENABLE": "0", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    changed = tool._job(args, planned, tmp_path, 2).environment
    assert changed["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:False" and changed["NCCL_GRAPH_REGISTER"] == "0"
