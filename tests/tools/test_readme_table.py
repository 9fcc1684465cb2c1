"""The README quotes what benchmarks/results holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    shown = [line.split("|")[3:5] for line in script("readme_table").table(tmp_path).splitlines()[2:]]
    assert [(case.strip(" `"), metric.strip()) for case, metric in shown] == [
        ("a/throughput", "tokens_per_s"),
        ("a/throughput", "peak_gib"),
        ("a/throughput_fp8", "tokens_per_s"),
        ("a/throughput_fp8", "peak_gib"),
        ("a/throughput_fp8-fp8.recipe", "tokens_per_s"),
    ]
