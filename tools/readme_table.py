#!/usr/bin/env python3
"""Writes the README's table of measured results from benchmarks/results/*.json; `--check` only compares."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: written by tools/readme_table.py -->\n", "<!-- /results -->"
# Benchmark, and the metrics that the table shows of it.
SHOWN = {
    "training": [
        "tokens_per_s", "tokens_per_s_with_optimizer", "tflops", "mfu", "gpu_busy_ms", "host_waits", "peak_gib",
        "loss_step_1", "loss_step_50",
    ],
    "memory_parallel": [
        "received_gb_s_256_mib", "tokens_per_s_with_optimizer", "step_cost_percent", "exchange_gb_s", "peak_gib",
        "table_gib", "table_gib_on_one",
    ],
    "scaling": ["tokens_per_s", "scaling_efficiency_percent", "times_the_moe", "exchange_gb_s", "peak_gib"],
    "conversion": ["checkpoint_mib", "largest_tensor_mib", "tiny_model_peak_mib", "to_hf_peak_mib", "from_hf_peak_mib"],
    "offload": ["trains", "step_cost_percent", "peak_gib", "tables_with_state_gib"],
    "soak": ["restarts", "checkpoints_equal_by_every_bit", "checkpoints_lost"],
    "kernels": [
        "lookup_forward_ms", "lookup_backward_ms", "retrieval_forward_ms", "layer_forward_ms",
        "layer_forward_backward_ms", "layer_t1_us", "lookup_forward_fp8_ms", "lookup_forward_fp8_speedup",
    ],
    "fp8_curves": ["loss_last_20", "loss_against_bf16"],
}  # fmt: skip
SWEPT = re.compile(r"T\d+_m\d+_")  # cases of a sweep are for plots, not for a table
ABLATED = re.compile(r"/throughput\w*-")  # presets without one of their settings: how fast they are says it all


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    wanted = head + BEGIN + table(ROOT / "benchmarks" / "results") + END + tail
    if "--check" in sys.argv[1:]:
        if wanted != text:
            print("README.md: the table of results is not what benchmarks/results says; run tools/readme_table.py")
        return int(wanted != text)
    readme.write_text(wanted)
    return 0


def table(folder: Path) -> str:
    """Markdown of all results in the folder, in the order of file names."""
    lines = ["| benchmark | hardware | case | metric | value |", "|---|---|---|---|---|"]
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if content["benchmark"] not in SHOWN:
            continue
        metrics = SHOWN[content["benchmark"]]
        lines += [
            f"| {content['benchmark']} | {content['hardware']} | `{row['case']}` | {row['metric']} | "
            f"{_number(row['value'])} {row['unit']} |"
            for row in content["rows"]
            if row["metric"] in metrics
            and not SWEPT.match(row["case"])
            and not (ABLATED.search(row["case"]) and row["metric"] != "tokens_per_s")
        ]
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    raise SystemExit(main())
