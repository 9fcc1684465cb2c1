#!/usr/bin/env python3
"""Measures what it costs to keep the value tables' optimizer in host memory (optimizer.value_offload), and shows a
model that trains only so.

    python tools/bench_offload.py --config examples/configs/ultramemv2_227m_1b.yaml data.paths='[data/corpus]'

Every case is a run of its own on one GPU. Cases of the recipe as it is:
  on_device                    optimizer on the GPU
  torch, deepspeed             in host memory, updated by the one or the other (DeepSpeed where it is installed)
and with tables so large (`--keys` per side; by default as large as it takes) that parameters, gradient and optimizer
state of the tables alone exceed the GPU's memory:
  too_large_on_device          must end out of memory: `trains` is 0
  too_large_deepspeed          (or too_large_torch, without it) must train
Rows: `trains`; `step_ms`, median of whole steps; `step_cost_percent`, over that of on_device; `host_update_ms`, from
the end of a step until the tables are updated, and what it consists of, each alone: `gradients_to_host_ms`, `adam_ms`,
`values_to_device_ms`; `peak_gib` of the GPU, and `predicted_gib`, the planner's (with its
allowance for fragmentation), against `gpu_gib`; `host_peak_gib` of the process; `set_up_s`; `loss_first`, `loss_last`;
`table_parameters`, and `tables_with_state_gib`, of 18 bytes a parameter on the device. Results go to
benchmarks/results/offload_<hardware>.json as they come. No checkpoint is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import UserError
from megatron_ultramem.planning.clusters import load_cluster, presets
from megatron_ultramem.planning.command import vocabulary
from megatron_ultramem.platform import prepare
from megatron_ultramem.quiet import quiet_dependencies
from megatron_ultramem.results import Row, short_hardware_name, write_results
from megatron_ultramem.training.host_adam import use_threads

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
WARMUP_STEPS = 2
BYTES_ON_DEVICE = 18  # of a parameter: bf16, fp32 gradient, fp32 master weight and two moments
GIB = 2**30
Figures = dict[str, tuple[float, str]]  # value and unit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--keys", type=int, help="model.memory.num_keys of the tables that are too large")
    parser.add_argument("--only", nargs="*", help="these cases alone")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step (default 8)")
    parser.add_argument("--steps", type=int, default=4, help="that are measured (default 4)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.setting=value")
    args = parser.parse_args()
    quiet_dependencies()
    if args.child:
        print(json.dumps(measure(args)))
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
    return 0


def compare(args: argparse.Namespace) -> list[Row]:
    """Rows of all cases, each written when it is there."""
    large = f"model.memory.num_keys={args.keys or keys_beyond_the_gpu(args)}"
    rows: list[Row] = []
    step_ms = measured_before(args.output)

    def run(case: str, *settings: str) -> None:
        if args.only and case not in args.only:
            return
        began = time.monotonic()
        figures = run_case(args, settings)
        if "step_ms" in figures:
            step_ms[case] = figures["step_ms"][0]
        if case in ("torch", "deepspeed") and "on_device" in step_ms and case in step_ms:
            figures["step_cost_percent"] = (100 * (step_ms[case] / step_ms["on_device"] - 1), "%")
        found = [Row(case, metric, value, unit) for metric, (value, unit) in figures.items()]
        rows.extend(found)
        if found:
            written = write_results(args.output, "offload", found)
            print(f"{case} ({time.monotonic() - began:.0f} s): {figures} -> {written}", file=sys.stderr, flush=True)

    offload = "optimizer.value_offload="
    backends = ["torch", *(["deepspeed"] if importlib.util.find_spec("deepspeed") else [])]
    run("on_device", offload + "none")
    for name in backends:
        run(name, offload + name)
    run("too_large_on_device", offload + "none", large)
    run(f"too_large_{backends[-1]}", offload + backends[-1], large)
    return rows


def measured_before(folder: Path) -> dict[str, float]:
    """Times of steps in the results file, by case; for cases that are left out now."""
    path = folder / f"offload_{short_hardware_name()}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {row["case"]: row["value"] for row in rows if row["metric"] == "step_ms"}


def keys_beyond_the_gpu(args: argparse.Namespace) -> int:
    """The fewest keys per side whose tables, with gradient and optimizer state, exceed the GPU by a twentieth."""
    from megatron_ultramem.memory.geometry import plan_pools

    model = load_config(args.config, args.overrides).model
    tables = sum(len(pool.layers) for pool in plan_pools(model))
    widths = model.memory.value_dim + model.memory.pre_value_dim
    memory = torch.cuda.get_device_properties(0).total_memory
    return math.ceil(math.sqrt(1.05 * memory / BYTES_ON_DEVICE / tables / widths))


def run_case(args: argparse.Namespace, settings: tuple[str, ...]) -> Figures:
    """Figures of one case in a process of its own, which may run out of memory; none if DeepSpeed cannot be used."""
    command = [sys.executable, __file__, "--child", "--config", str(args.config), "--steps", str(args.steps)]
    command += ["--micro-batches", str(args.micro_batches), *args.overrides, *settings]
    result = subprocess.run(command, capture_output=True, text=True)
    found: Figures = {}
    if result.returncode == 0:
        found = json.loads(result.stdout.splitlines()[-1])
    elif "OutOfMemoryError" in result.stderr or "CUDA out of memory" in result.stderr:
        found = {"trains": (0.0, "")}
    elif "DeepSpeed's CPU Adam cannot be used" in result.stderr:
        print(result.stderr.splitlines()[-1], file=sys.stderr, flush=True)
        return {}
    else:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    return found | predict(args, [*args.overrides, *settings])


def predict(args: argparse.Namespace, overrides: list[str]) -> Figures:
    """What the planner says of the GPU's memory; nothing for hardware that it does not know."""
    if short_hardware_name() not in presets():
        return {}
    from megatron_ultramem.planning.evaluate import Evaluator, on_cluster
    from megatron_ultramem.planning.layout import layout_of

    gpu = torch.cuda.get_device_properties(0).total_memory / GIB
    cluster = dataclasses.replace(load_cluster(short_hardware_name()), memory_gib=gpu)
    config = on_cluster(load_config(args.config, [*run_settings(args), *overrides]), cluster)
    _, memory = Evaluator(config, vocabulary(config), cluster).memory(config, layout_of(config, 1))
    return {"predicted_gib": (memory.required / GIB, "GiB"), "gpu_gib": (gpu, "GiB")}


def run_settings(args: argparse.Namespace) -> list[str]:
    micro = load_config(args.config, args.overrides, check=False).train.micro_batch_size
    return [
        f"train.global_batch_size={micro * args.micro_batches}", f"train.steps={WARMUP_STEPS + args.steps}",
        "train.eval_steps=0", "checkpoint.load=none", "schedule.warmup_steps=2",
    ]  # fmt: skip


def measure(args: argparse.Namespace) -> Figures:
    """Trains for a few steps on one GPU."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(args.config, [*run_settings(args), f"train.run_dir={folder}", *args.overrides])
        prepare(config.train.device)
        from megatron_ultramem.training.distributed import destroy_distributed
        from megatron_ultramem.training.loop import train_step
        from megatron_ultramem.training.optimizer import whole_parameters
        from megatron_ultramem.training.setup import set_up

        began = time.perf_counter()
        run = set_up(config)
        set_up_seconds = time.perf_counter() - began
        losses, seconds = [], []
        for _ in range(config.train.steps):
            began = time.perf_counter()
            losses.append(train_step(run)["loss"])  # waits for the device, and for the update of the step before
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        with whole_parameters(run.chunks):
            if run.platform.is_cuda:
                torch.cuda.synchronize()
            update_seconds = time.perf_counter() - began
            tables = sum(
                param.numel() for param in run.model[0].parameters() if getattr(param, "is_value_table", False)
            )
        peak = torch.cuda.max_memory_allocated() if run.platform.is_cuda else 0
        parts = parts_of_update(run.optimizer) if config.optimizer.value_offload != "none" else {}
        destroy_distributed()
    figures = {
        "trains": (1.0, ""),
        "step_ms": (1e3 * statistics.median(seconds[WARMUP_STEPS:]), "ms"),
        "loss_first": (losses[0], "nats/token"),
        "loss_last": (losses[-1], "nats/token"),
        "peak_gib": (peak / GIB, "GiB"),
        "host_peak_gib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "GiB"),
        "set_up_s": (set_up_seconds, "s"),
        "table_parameters": (float(tables), ""),
        "tables_with_state_gib": (BYTES_ON_DEVICE * tables / GIB, "GiB"),
    }
    if config.optimizer.value_offload != "none":
        figures |= parts
        figures["host_update_ms"] = (1e3 * update_seconds, "ms")
    return figures


def parts_of_update(optimizer: Any) -> Figures:
    """What an update of all tables consists of, one after the other; the tables are of no use afterwards."""
    cuda = optimizer.tables[0].param.device.type == "cuda"

    def timed(action: Callable[[Any], object]) -> tuple[float, str]:
        began = time.perf_counter()
        for table in optimizer.tables:
            action(table)
        if cuda:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began), "ms"

    with torch.no_grad(), ThreadPoolExecutor(1, initializer=use_threads, initargs=(None,)) as worker:
        return {
            "gradients_to_host_ms": timed(lambda table: table.grad.copy_(table.device_grad, non_blocking=True)),
            "adam_ms": timed(lambda table: worker.submit(table.adam.update, table.grad, 10, table.settings()).result()),
            "values_to_device_ms": timed(
                lambda table: table.values.copy_(
                    table.grad.view(table.values.dtype)[: table.values.numel()], non_blocking=True
                )
            ),
        }


if __name__ == "__main__":
    raise SystemExit(main())
