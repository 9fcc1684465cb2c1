#!/usr/bin/env python3
"""Measures what it costs to keep the value tables' optimizer in host memory (optimizer.value_offload).

    python tools/bench_offload.py --config examples/configs/ultramemv2_227m_1b.yaml data.paths='[data/corpus]'

Every case is a run of its own on one GPU, whose steps have 8 micro-batches. Cases of the recipe as it is:
  on_device                    optimizer on the GPU
  torch, deepspeed             in host memory, updated by the one or the other (DeepSpeed where it is installed)
and with tables so large (`--keys` per side; by default as large as it takes) that parameters, gradient and optimizer
state of the tables alone exceed the GPU's memory:
  too_large_on_device          must end out of memory: `trains` is 0
  too_large_torch, too_large_deepspeed
Rows: `trains`; `step_ms`, median of 5 whole steps; `step_cost_percent`, over that of on_device; `peak_gib`;
`loss_first`, `loss_last`; `table_parameters`, and `tables_with_state_gib`, of 18 bytes a parameter on the device,
against `gpu_gib`. Results go to benchmarks/results/offload_<hardware>.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import UserError
from megatron_ultramem.platform import prepare
from megatron_ultramem.quiet import quiet_dependencies
from megatron_ultramem.results import Row, write_results

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
MICRO_BATCHES, WARMUP_STEPS, MEASURED_STEPS = 8, 3, 5
BYTES_ON_DEVICE = 18  # of a parameter: bf16, fp32 gradient, fp32 master weight and two moments


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--keys", type=int, help="model.memory.num_keys of the tables that are too large")
    parser.add_argument("--only", nargs="*", help="these cases alone")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.setting=value")
    args = parser.parse_args()
    quiet_dependencies()
    if args.child:
        print(json.dumps(measure(args.config, args.overrides)))
        return 0
    try:
        rows = compare(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table("case", "metric", "value", "unit")
    for row in rows:
        table.add_row(row.case, row.metric, f"{row.value:,.4g}" if row.value < 1e4 else f"{row.value:,.0f}", row.unit)
    Console().print(table)
    print(write_results(args.output, "offload", rows))
    return 0


def compare(args: argparse.Namespace) -> list[Row]:
    backends = ["torch", *(["deepspeed"] if importlib.util.find_spec("deepspeed") else [])]
    large = [f"model.memory.num_keys={args.keys or keys_beyond_the_gpu(args)}"]
    cases = {"on_device": ["optimizer.value_offload=none"]}
    cases |= {name: [f"optimizer.value_offload={name}"] for name in backends}
    cases |= {f"too_large_{name}": [*settings, *large] for name, settings in cases.items()}
    rows: list[Row] = []
    for case, settings in cases.items():
        if args.only and case not in args.only:
            continue
        figures = run_case(args.config, [*args.overrides, *settings])
        rows += [Row(case, metric, value, unit) for metric, (value, unit) in figures.items()]
        print(f"{case}: {figures}", file=sys.stderr, flush=True)
    step = {row.case: row.value for row in rows if row.metric == "step_ms"}
    for case in backends:
        if case in step and "on_device" in step:
            rows.append(Row(case, "step_cost_percent", 100 * (step[case] / step["on_device"] - 1), "%"))
    return rows


def keys_beyond_the_gpu(args: argparse.Namespace) -> int:
    """The fewest keys per side whose tables, with gradient and optimizer state, exceed the GPU by a twentieth."""
    from megatron_ultramem.memory.geometry import plan_pools

    model = load_config(args.config, args.overrides).model
    tables = sum(len(pool.layers) for pool in plan_pools(model))
    widths = model.memory.value_dim + model.memory.pre_value_dim
    memory = torch.cuda.get_device_properties(0).total_memory
    return math.ceil(math.sqrt(1.05 * memory / BYTES_ON_DEVICE / tables / widths))


def run_case(config: Path, settings: list[str]) -> dict[str, tuple[float, str]]:
    """Figures of one case in a process of its own, which may run out of memory."""
    command = [sys.executable, __file__, "--child", "--config", str(config), *settings]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        found: dict[str, tuple[float, str]] = json.loads(result.stdout.splitlines()[-1])
        return found
    if "OutOfMemoryError" in result.stderr or "out of memory" in result.stderr:
        return {"trains": (0.0, "")}
    raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")


def measure(path: Path, overrides: list[str]) -> dict[str, tuple[float, str]]:
    """Trains for a few steps on one GPU."""
    micro = load_config(path, overrides, check=False).train.micro_batch_size
    steps = WARMUP_STEPS + MEASURED_STEPS
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(path, [
            f"train.run_dir={folder}", f"train.global_batch_size={micro * MICRO_BATCHES}", f"train.steps={steps}",
            "train.eval_steps=0", "checkpoint.load=none", "schedule.warmup_steps=2", *overrides,
        ])  # fmt: skip
        prepare(config.train.device)
        from megatron_ultramem.training.distributed import destroy_distributed
        from megatron_ultramem.training.loop import train_step
        from megatron_ultramem.training.optimizer import whole_parameters
        from megatron_ultramem.training.setup import set_up

        run = set_up(config)
        losses, seconds = [], []
        for _ in range(steps):
            began = time.perf_counter()
            losses.append(train_step(run)["loss"])  # waits for the device, and for the update of the step before
            seconds.append(time.perf_counter() - began)
        with whole_parameters(run.chunks):
            tables = sum(
                param.numel() for param in run.model[0].parameters() if getattr(param, "is_value_table", False)
            )
        cuda = run.platform.is_cuda
        gpu = torch.cuda.get_device_properties(0).total_memory if cuda else 0
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        destroy_distributed()
    return {
        "trains": (1.0, ""),
        "step_ms": (1e3 * statistics.median(seconds[WARMUP_STEPS:]), "ms"),
        "loss_first": (losses[0], "nats/token"),
        "loss_last": (losses[-1], "nats/token"),
        "peak_gib": (peak / 2**30, "GiB"),
        "table_parameters": (float(tables), ""),
        "tables_with_state_gib": (BYTES_ON_DEVICE * tables / 2**30, "GiB"),
        "gpu_gib": (gpu / 2**30, "GiB"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
