"""tools/check_plan.py on a tiny recipe, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.scripts import script

ROOT = Path(__file__).parents[2]
RECIPE = """
model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4, ffn_hidden_size: 96, max_sequence_length: 64,
        memory: {num_keys: 12, key_dim: 8, top_m: 6, value_dim: 16, pre_value_dim: 16}}
data: {sequence_length: 64}
train: {micro_batch_size: 1, global_batch_size: 2, precision: fp32}
logging: {progress: false, tensorboard: false}
"""


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "check_plan.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_predicted_and_measured_figures_are_written_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    done = call(
        f"--config={tmp_path}/tiny.yaml", "--cluster=h100", f"--output={tmp_path}/results",
        "--cases=as_is,recompute_full_twice_the_micro_batch",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "results").glob("plan_*.json")
    rows = {(row["case"], row["metric"]): row["value"] for row in json.loads(written.read_text())["rows"]}
    assert {case for case, _ in rows} == {"tiny/as_is", "tiny/recompute_full_twice_the_micro_batch"}
    for case in {case for case, _ in rows}:
        assert rows[case, "parameters_predicted"] == rows[case, "parameters_measured"] > 0
        assert rows[case, "step_ms_measured"] > 0
        error = 100 * (rows[case, "step_ms_predicted"] / rows[case, "step_ms_measured"] - 1)
        assert rows[case, "step_ms_error"] == pytest.approx(error)

    content = json.loads(written.read_text())
    for row in content["rows"]:
        if row["metric"] == "step_ms_predicted":
            row["value"] = 0.0
    old = written.rename(tmp_path / "plan_h100.json")
    old.write_text(json.dumps(content))
    assert main_again(tmp_path) == 0
    again = {(row["case"], row["metric"]): row["value"] for row in json.loads(old.read_text())["rows"]}
    assert again == rows


def main_again(folder: Path) -> int:
    arguments = [f"--config={folder}/tiny.yaml", "--cluster=h100", f"--output={folder}", "--again"]
    status: int = script("check_plan").main(arguments)
    return status


def test_there_is_nothing_to_predict_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    assert main_again(tmp_path) == 2
    assert "--again with --cluster h100: there is no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--cases=other"], "--cases other: legal: as_is"), (["--cluster=other"], "--cluster other: unknown")],
)
def test_refused_before_anything_runs(
    tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    assert script("check_plan").main([f"--config={tmp_path}/tiny.yaml", *arguments]) == 2
    assert said in capsys.readouterr().err
