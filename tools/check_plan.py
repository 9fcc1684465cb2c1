#!/usr/bin/env python3
"""Measures what `ultramem plan` predicts, on this machine: parameters, peak memory, step time.

    python tools/check_plan.py --config examples/configs/ultramemv2_227m_1b.yaml

Trains a recipe for a few steps in several layouts, each in a process of its own, on the standard library's sources
unless data.* says otherwise, and writes predicted and measured figures side by side to
benchmarks/results/plan_<hardware>.json. `kernels` counts what the GPU ran in a micro-batch and `host_us_per_kernel` is
the micro-batch's wall time for each: where that is well above the GPU's own time, the constants of launches in
megatron_ultramem/planning/calibration.py follow from it. About three minutes on one H100.

With --again nothing is measured: what benchmarks/results/plan_<cluster>.json holds is predicted anew, on any machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config, TokenizerConfig
from megatron_ultramem.errors import UserError, exit_status
from megatron_ultramem.planning.clusters import Cluster
from megatron_ultramem.planning.command import vocabulary
from megatron_ultramem.planning.evaluate import Evaluator, on_cluster
from megatron_ultramem.planning.memory import GIB
from megatron_ultramem.planning.this_machine import cluster_of_this_machine
from megatron_ultramem.quiet import quiet_dependencies
from megatron_ultramem.results import Row, commit, write_results

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
# Settings, and by how much the micro-batch is larger.
CASES: dict[str, tuple[list[str], int]] = {
    "as_is": ([], 1),
    "recompute_memory": (["model.memory.recompute=true"], 1),
    "recompute_full_twice_the_micro_batch": (["train.recompute=full"], 2),
    "memory_graphs": (["train.cuda_graphs=memory"], 1),
    "throughput": (["preset=throughput"], 1),
    "throughput_fp8": (["preset=throughput", "train.fp8.recipe=tensorwise"], 1),
}
MICRO_BATCHES = 4  # in a step
WARM_UP_STEPS, MEASURED_STEPS = 2, 3
FILES = 200  # of the standard library: more text than the steps need


def main(arguments: list[str] | None = None) -> int:
    args = _arguments(arguments)
    quiet_dependencies()
    return exit_status(lambda: _child(args) if args.child else _again(args) if args.again else _all_cases(args))


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--cases", default=",".join(CASES), help="default: %(default)s")
    parser.add_argument("--cluster", help="preset or .yaml file that describes this machine (default: by its GPU)")
    parser.add_argument("--again", action="store_true", help="predict anew what was measured on --cluster")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.setting=value")
    return parser.parse_args(arguments)


def _all_cases(args: argparse.Namespace) -> None:
    """Runs the cases and shows them; what is measured is written at once, so that a case that fails costs no other."""
    unknown = [case for case in args.cases.split(",") if case not in CASES]
    if unknown:
        raise UserError(f"--cases {unknown[0]}: legal: {', '.join(CASES)}")
    cluster_of_this_machine(args.cluster)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(args.config, args.overrides)
        if not (config.data.paths or config.data.train_paths):
            args.overrides += _text(Path(folder) / "text")
        for case in args.cases.split(","):
            found = Path(folder) / f"{case}.json"
            command = [sys.executable, __file__, f"--config={args.config}", f"--child={case}", f"--output={found}"]
            command += [f"--cluster={args.cluster}"] if args.cluster else []
            command.append(f"train.run_dir={folder}/{case}")
            if subprocess.run([*command, *args.overrides]).returncode != 0:
                raise UserError(f"case {case} failed; its output says why")
            rows += [Row(**row) for row in json.loads(found.read_text())]
            written = write_results(args.output, "plan", rows)
    _show(rows)
    print(written)


def _text(prefix: Path) -> list[str]:
    """Some sources of the standard library, tokenised, as settings."""
    from megatron_ultramem.training.preprocess import preprocess
    from megatron_ultramem.training.stdlib_corpus import stdlib_files

    preprocess(stdlib_files()[:FILES], prefix, TokenizerConfig())
    return [f"data.train_paths=[{prefix}]", f"data.cache_dir={prefix.parent}/cache"]


def _config(args: argparse.Namespace, case: str) -> Config:
    settings, larger = CASES[case]
    micro = larger * load_config(args.config, args.overrides).train.micro_batch_size
    return load_config(args.config, [
        *args.overrides, *settings, f"train.micro_batch_size={micro}",
        f"train.global_batch_size={micro * MICRO_BATCHES}", f"train.steps={WARM_UP_STEPS + MEASURED_STEPS}",
        "schedule.warmup_steps=1", "schedule.decay_steps=null", "train.eval_steps=0", "checkpoint.load=none",
        "train.rampup_batch_size=[]",
    ])  # fmt: skip


def _again(args: argparse.Namespace) -> None:
    """Puts what is predicted now beside what was measured; all else of the file stays."""
    path = args.output / f"plan_{args.cluster}.json"
    if not path.exists():
        raise UserError(f"--again with --cluster {args.cluster}: there is no {path}; legal: what was measured on")
    content, cluster = json.loads(path.read_text()), cluster_of_this_machine(args.cluster)
    figures = {(row["case"], row["metric"]): row for row in content["rows"]}
    rows = []
    for case in CASES:
        name = f"{args.config.stem}/{case}"
        if (name, "step_ms_measured") not in figures:
            continue
        config = _config(args, case)
        for metric, value in predicted(config, vocabulary(config), cluster).items():
            if measured := figures.get((name, f"{metric}_measured")):
                rows += _pair(name, metric, value, measured["value"], measured["unit"])
    for row in rows:
        figures[row.case, row.metric]["value"] = row.value
    content["predicted_at"] = commit()
    path.write_text(json.dumps(content, indent=1) + "\n")
    _show(rows)
    print(path)


def _child(args: argparse.Namespace) -> int:
    config = _config(args, args.child)
    from megatron_ultramem.platform import prepare

    prepare(config.train.device)
    rows = measure(config, f"{args.config.stem}/{args.child}", cluster_of_this_machine(args.cluster))
    args.output.write_text(json.dumps([row.__dict__ for row in rows]))
    return 0


def predicted(config: Config, vocab_size: int, cluster: Cluster) -> dict[str, float]:
    """What the planner says of one GPU of the cluster, by metric."""
    planned_on = on_cluster(config, cluster)
    plan = Evaluator(planned_on, vocab_size, cluster).evaluate(planned_on, 1)
    return {
        "parameters": plan.parameters.total,
        "step_ms": plan.time.seconds * 1e3,
        "peak_gib": plan.memory.peak / GIB,
        "gpu_busy_ms": plan.time.micro_batch.gpu * 1e3,
    }


def measure(config: Config, case: str, cluster: Cluster) -> list[Row]:
    """One case in this process: rows in pairs, predicted and measured."""
    import torch

    from megatron_ultramem.training.distributed import destroy_distributed
    from megatron_ultramem.training.loop import train_step
    from megatron_ultramem.training.measure import covered_ms, forward_backward_only, median_seconds, trace
    from megatron_ultramem.training.setup import set_up

    run = set_up(config)
    for _ in range(WARM_UP_STEPS):
        train_step(run)
    step_ms = median_seconds(run, lambda: train_step(run), MEASURED_STEPS) * 1e3
    parameters = sum(param.numel() for chunk in run.model for param in chunk.parameters())
    plan = predicted(config, run.checkpoints.vocab_size, cluster)
    rows = _pair(case, "parameters", plan["parameters"], parameters, "")
    rows += _pair(case, "step_ms", plan["step_ms"], step_ms, "ms")
    if run.platform.is_cuda:
        peak = torch.cuda.max_memory_allocated() / GIB
        rows += _pair(case, "peak_gib", plan["peak_gib"], peak, "GiB")
        forward_backward_ms = median_seconds(run, lambda: forward_backward_only(run, 1), MEASURED_STEPS) * 1e3
        spans = trace(run, lambda: forward_backward_only(run, 1))
        rows += _pair(case, "gpu_busy_ms", plan["gpu_busy_ms"], covered_ms(spans), "ms per micro-batch")
        rows += [
            Row(case, "micro_batch_ms", forward_backward_ms, "ms"),
            Row(case, "kernels", len(spans), "per micro-batch"),
            Row(case, "host_us_per_kernel", forward_backward_ms * 1e3 / len(spans), "us"),
        ]
    destroy_distributed()
    return rows


def _pair(case: str, name: str, predicted: float, measured: float, unit: str) -> list[Row]:
    return [
        Row(case, f"{name}_predicted", predicted, unit),
        Row(case, f"{name}_measured", measured, unit),
        Row(case, f"{name}_error", 100 * (predicted / measured - 1), "% of the measured"),
    ]


def _show(rows: list[Row]) -> None:
    table = Table("case", "", "predicted", "measured", "error")
    values = {(row.case, row.metric): row.value for row in rows}
    for (case, metric), value in values.items():
        if metric.endswith("_predicted"):
            name = metric.removesuffix("_predicted")
            measured, error = values[case, f"{name}_measured"], values[case, f"{name}_error"]
            table.add_row(case, name, f"{value:,.6g}", f"{measured:,.6g}", f"{error:+.1f} %")
    Console(width=140).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
