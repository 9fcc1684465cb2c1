"""tools/fp8_curves.py at toy size: a process for each variant; what fails costs the others nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.training.preprocess import preprocess
from megatron_ultramem.training.stdlib_corpus import stdlib_files

ROOT = Path(__file__).parents[2]
RECIPE = """
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, ffn_hidden_size: 64, max_sequence_length: 32,
  memory: {{num_keys: 12, key_dim: 8, top_m: 4, value_dim: 16, pre_value_dim: 16}}}}
data: {{paths: [{data}], sequence_length: 32}}
train: {{micro_batch_size: 2}}
logging: {{tensorboard: false, progress: false}}
"""


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
    again = subprocess.run([*command, "fp8_tables"], capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    rows = {(row["case"], row["metric"]): row["value"] for row in json.loads(path.read_text())["rows"]}
    assert rows["fp8_tables", "loss_against_bf16"] == figures["fp8_tables", "loss_against_bf16"]
