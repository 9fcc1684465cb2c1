"""tools/fp8_curves.py at toy size: a process for each variant; what fails costs the others nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.training.preprocess import preprocess
from megatron_ultramem.training.stdlib_corpus import stdlib_files
from tests.tools.scripts import script

ROOT = Path(__file__).parents[2]
RECIPE = """
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, ffn_hidden_size: 64, max_sequence_length: 32,
  memory: {{num_keys: 12, key_dim: 8, top_m: 4, value_dim: 16, pre_value_dim: 16}}}}
data: {{paths: [{data}], sequence_length: 32}}
train: {{micro_batch_size: 2}}
logging: {{tensorboard: false, progress: false}}
"""


@pytest.mark.slow
def test_variants_are_compared_with_bf16_and_failures_named(tmp_path: Path) -> None:
    preprocess(stdlib_files()[:6], tmp_path / "data", TokenizerConfig(), workers=1)
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(data=tmp_path / "data"))
    command = [sys.executable, str(ROOT / "tools" / "fp8_curves.py"), "--config", str(tmp_path / "tiny.yaml"),
               "--steps", "21", "--output", str(tmp_path), "--variants"]  # fmt: skip
    done = subprocess.run([*command, "bf16,fp8_delayed,fp8_tables"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "failed: fp8_delayed" in done.stderr  # no GPU here
    assert "train.fp8.recipe = delayed needs Transformer Engine on a GPU" in done.stderr
    (path,) = tmp_path.glob("fp8_curves_*.json")
    figures = {(row["case"], row["metric"]): row["value"] for row in json.loads(path.read_text())["rows"]}
    assert {case for case, _ in figures} == {"bf16", "fp8_tables"}
    assert figures["bf16", "loss_against_bf16"] == 0.0 and abs(figures["fp8_tables", "loss_against_bf16"]) < 2.0
    assert figures["bf16", "loss_step_1"] > figures["bf16", "loss_step_21"]
    assert figures["fp8_tables", "not_finite"] == 0
    again = subprocess.run(
        [*command, "fp8_tables", "--gpus", "0,1", "--seeds", "1234,5"], capture_output=True, text=True, cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    rows = {(row["case"], row["metric"]): row["value"] for row in json.loads(path.read_text())["rows"]}
    assert rows["fp8_tables", "seeds"] == 2 and rows["bf16", "seeds"] == 1
    assert 0 < abs(rows["fp8_tables", "loss_last_20"] - figures["fp8_tables", "loss_last_20"]) < 0.2


def test_a_results_file_is_drawn_with_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curves = {
        name: {"1": {"losses": [4 / (1 + step) + shift for step in range(40)], "grad_norms": [1.0 + shift] * 40}}
        for name, shift in (("bf16", 1.0), ("fp8_tables", 1.001))
    }
    tool, draw = script("fp8_curves"), script("draw_fp8_curves")
    rows = [asdict(row) for row in tool.rows_of(curves, None)]
    (tmp_path / "curves.json").write_text(json.dumps({"hardware": "a GPU", "rows": rows}))
    assert draw.main([str(tmp_path / "curves.json"), str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 10000
    hardware, found, ends = draw.read(tmp_path / "curves.json")
    (labels,) = [axes.get_legend_handles_labels()[1] for axes in draw.draw(hardware, found, ends).axes[:1]]
    assert labels == ["bf16", "fp8_tables (+0.09 % at the end)"]
    (tmp_path / "other.json").write_text(json.dumps({"hardware": "a GPU", "rows": []}))
    assert draw.main([str(tmp_path / "other.json"), str(tmp_path / "x.png")]) == 2
    assert "other.json: holds no curves; legal: a file with the variant bf16" in capsys.readouterr().err


def test_seeds_are_compared_one_by_one() -> None:
    def run(end: float) -> dict[str, list[float]]:
        return {"losses": [9.0, *[end] * 20], "grad_norms": [end] * 21}

    curves = {"bf16": {"1": run(2.0), "2": run(4.0)}, "fp8_tables": {"1": run(2.02), "2": run(3.96), "3": run(100.0)}}
    found = {(row.case, row.metric): row.value for row in script("fp8_curves").rows_of(curves, None)}
    assert found["fp8_tables", "loss_against_bf16"] == pytest.approx(0.0, abs=1e-9)
    assert found["fp8_tables", "loss_against_bf16_error"] == pytest.approx(1.0)
    assert found["bf16", "loss_last_20"] == 3.0 and found["bf16", "loss_step_1"] == 9.0
    assert found["bf16", "loss_against_bf16_error"] == 0.0 and found["fp8_tables", "seeds"] == 3
