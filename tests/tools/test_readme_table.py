"""The README and docs/comparison.md quote what benchmarks/results holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.tools.scripts import script

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    done = subprocess.run(
        [sys.executable, "tools/readme_table.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_presets_without_a_setting_show_their_speed_alone(tmp_path: Path) -> None:
    rows = [
        {"case": case, "metric": metric, "value": 1.0, "unit": ""}
        for case in ("a/throughput", "a/throughput_fp8", "a/throughput_fp8-fp8.recipe")
        for metric in ("tokens_per_s", "peak_gib")
    ]
    (tmp_path / "training_h100.json").write_text(
        json.dumps({"benchmark": "training", "hardware": "H100", "rows": rows})
    )
    head, _, *shown = script("readme_table").table(tmp_path).splitlines()
    assert head == "| training, H100 | tokens_per_s | peak_gib |"
    assert shown == [
        "| `a/throughput` | 1 | 1 |",
        "| `a/throughput_fp8` | 1 | 1 |",
        "| `a/throughput_fp8-fp8.recipe` | 1 |  |",
    ]


def write(folder: Path, benchmark: str, cases: dict[str, dict[str, float]]) -> None:
    rows: list[dict[str, Any]] = [
        {"case": case, "metric": metric, "value": value, "unit": "% of x1" if "efficiency" in metric else "x"}
        for case, figures in cases.items()
        for metric, value in figures.items()
    ]
    content = {"benchmark": benchmark, "hardware": "a GPU", "versions": {"torch": "9.9"}, "commit": "abc", "rows": rows}
    (folder / f"{benchmark}_gpu.json").write_text(json.dumps(content))


def figures(speed: float, busy: float, share: float) -> dict[str, float]:
    return {
        "tokens_per_s": speed, "tokens_per_s_with_optimizer": speed / 2, "tflops": 3.0, "peak_gib": 4.0,
        "gpu_busy_ms": busy, "gpu_busy_percent": share, "kernels": 100.0, "megatron_core": 0.19,
    }  # fmt: skip


def test_models_are_compared_in_wall_time_and_by_what_the_gpu_computes(tmp_path: Path) -> None:
    ours, slow, fast, dense = figures(3000, 10, 98), figures(900, 12, 25), figures(1000, 15, 30), figures(6000, 5, 99)
    write(tmp_path, "training", {
        "ultramemv2_227m_1b": ours, "ultramemv2_227m_1b/preset": ours, "ultramemv2_227m_1b/throughput": {"mfu": 3.0},
        "olmoe_227m_1b": fast, "olmoe_227m_1b/graphs": fast, "olmoe_227m_1b/plain": slow,
        "dense_227m": dense, "dense_227m/preset": dense,
    })  # fmt: skip
    tool = script("readme_table")
    text = " ".join(tool.speed(tmp_path).split())
    assert "UltraMemV2 has 3.00 times the MoE's tokens/s in wall time" in text
    assert "1.50 times as fast as the MoE in its fastest way, and 1.20 times as fast as in the way" in text
    assert "0.50 times the dense model's tokens/s" in text
    assert "| `olmoe_227m_1b` | `graphs` | 1,000 | 500 | 3 | 4 | 15 | 30 % | launches |" in text
    assert "| `dense_227m` | `preset` | 6,000 | 3,000 | 3 | 4 | 5 | 99 % | the GPU |" in text
    assert text.index("| `graphs` | 0.19 | 1,000 |") < text.index("| `plain` | 0.19 | 900 |")
    readme = tool.table(tmp_path)
    assert "`olmoe_227m_1b`" in readme and "/graphs" not in readme and "ultramemv2_227m_1b/throughput" in readme


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    tool = script("readme_table")
    write(tmp_path, "training", {"ultramemv2_227m_1b": {"tokens_per_s": 1.0}})
    assert tool.speed(tmp_path) == tool.learning(tmp_path) == "Not measured yet.\n"


def test_the_learning_curve_is_shown_with_its_table(tmp_path: Path) -> None:
    write(tmp_path, "learning_curve", {"moe": {"valid_loss": 2.0}})
    (tmp_path / "learning_curve.md").write_text("| moe | 2.0 |\n")
    text = script("readme_table").learning(tmp_path)
    assert "| moe | 2.0 |" in text and "(../benchmarks/results/learning_curve.png)" in text and "torch 9.9" in text


def test_predictions_stand_beside_measurements(tmp_path: Path) -> None:
    write(tmp_path, "plan", {"r/as_is": {"step_ms_predicted": 90.0, "step_ms_measured": 100.0, "step_ms_error": -10.0}})
    assert "| a GPU | `r/as_is` | step_ms | 90 x | 100 x | -10.0 % |" in script("readme_table").plan(tmp_path)


def test_ratios_of_weak_scaling_say_what_they_are_against(tmp_path: Path) -> None:
    cases = {
        "ultramemv2_1b_7b/columns_x1": {"tokens_per_s": 10.0, "step_ms": 7.0},
        "ultramemv2_1b_7b/columns_tp2_x2": {"tokens_per_s": 15.0, "step_ms": 8.0, "scaling_efficiency_percent": 75.0},
        "ultramemv2_1b_7b/columns_x2": {"tokens_per_s": 18.0, "step_ms": 9.0, "scaling_efficiency_percent": 89.98},
        "olmoe_1b_7b/moe_x2": {"tokens_per_s": 8.0, "step_ms": 9.5},
        "olmoe_1b_7b/moe_graphs_cutlass_x2": {"tokens_per_s": 9.0, "step_ms": 9.0},
        "ultramemv2_2_5b_120b_top256/cut_columns_x2": {"tokens_per_s": 5.0, "step_ms": 5.0, "layers": 4.0},
    }
    write(tmp_path, "scaling", cases)
    path = tmp_path / "scaling_gpu.json"
    content = json.loads(path.read_text()) | {"earlier": [{"cases": ["ultramemv2_1b_7b/columns_x1"], "commit": "old"}]}
    for row in content["rows"]:
        if row["metric"] == "scaling_efficiency_percent" and "tp2" in row["case"]:
            row["unit"] = "% of columns_x1"
    path.write_text(json.dumps(content))
    tool = script("readme_table")
    text = tool.scaling(tmp_path)
    assert "| `ultramemv2_1b_7b/columns_tp2_x2` |  | 15 | 75 (of `columns_x1`) | 8 |" in text
    assert "| `ultramemv2_1b_7b/columns_x2` |  | 18 | 89.98 | 9 |" in text
    (line,) = (line for line in text.splitlines() if "of two commits" in line)
    assert line.count("against `columns_x1` at old") == 2 and "columns_tp2_x2" in line and "moe" not in line
    readme = tool.table(tmp_path)
    assert "| layers | tokens_per_s |" in readme and "cut_columns_x2` | 4 | 5 |" in readme
    assert "moe_graphs_cutlass_x2" in readme and "moe_x2" not in readme and "tp2" not in readme  # the MoE to beat


def test_a_run_of_weak_scaling_is_a_line_and_the_readme_has_the_first_ways(tmp_path: Path) -> None:
    one = {"tokens_per_s": 1100.0, "step_ms": 7.0, "predicted_peak_gib": 3.0}
    cases = {
        "ultramemv2_1b_7b/columns_x4": {"tokens_per_s": 4000.0, "scaling_efficiency_percent": 91.0, "step_ms": 8.0},
        "ultramemv2_1b_7b/columns_x1": one,
        "ultramemv2_1b_7b/auto_x1": one,
        "ultramemv2_1b_7b/rows_x1": one,
        "olmoe_1b_7b/moe_x4": {"tokens_per_s": 2.0, "step_ms": 9.0, "step_ms_spread_percent": 1.25},
        "ultramemv2_2_5b_120b_top256/cut_columns_x1": {"fits": 0.0, "predicted_peak_gib": 256.0},
    }
    write(tmp_path, "scaling", cases)
    path = tmp_path / "scaling_gpu.json"
    earlier = [{"cases": ["olmoe_1b_7b/moe_x4", "ultramemv2_2_5b_120b_top256/cut_columns_x1"], "commit": "old"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"earlier": earlier}))
    tool = script("readme_table")
    lines = tool.scaling(tmp_path).splitlines()
    heads = "case | tokens/s | of ideal, % | step, ms | step's spread, % | predicted, GiB"
    assert lines[2:] == [
        f"| {heads} |",
        "|---|---|---|---|---|---|",
        "| `olmoe_1b_7b/moe_x4` | 2 |  | 9 | 1.2 |  |",
        "| `ultramemv2_1b_7b/columns_x1`, `auto`, `rows` | 1,100 |  | 7 |  | 3 |",
        "| `ultramemv2_1b_7b/columns_x4` | 4,000 | 91 | 8 |  |  |",
        "",
        "Not run, as the planner says that they do not fit a GPU: "
        "`ultramemv2_2_5b_120b_top256/cut_columns_x1` (256 GiB).",
        "",
        "Measured before, at commit old: `olmoe_1b_7b/moe_x4`.",
        "",
        "Ratios of figures of two commits: `ultramemv2_1b_7b/columns_x4` (against `moe_x4` at old).",
    ]
    shown = [line.split("`")[1] for line in tool.table(tmp_path).splitlines()[2:]]
    assert shown == ["ultramemv2_1b_7b/columns_x4", "ultramemv2_1b_7b/columns_x1", "olmoe_1b_7b/moe_x4"]
