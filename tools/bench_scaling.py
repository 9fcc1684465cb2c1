#!/usr/bin/env python3
"""Measures how recipes scale over the GPUs of this machine, with the planner's prediction beside each figure.

    python tools/bench_scaling.py data.paths='[data/corpus]'

Weak scaling: every rank has the same number of micro-batches, however many ranks there are. Every case is a run of its
own, `<recipe>/<way>_x<ranks>`, in the order of importance, so that `--seconds` may cut off the rest. Ways share tables
(MoE: experts) among all ranks of a pipeline stage. Rows (benchmarks/results/scaling_<hardware>.json):
  tokens_per_s                 forward and backward, all ranks together
  tokens_per_s_with_optimizer  whole steps
  scaling_efficiency_percent   of tokens_per_s, against the same way on the fewest ranks
  times_the_moe                tokens_per_s over the best of the MoE with as many ranks
  exchange_mb, exchange_gb_s, exchange_hidden_percent   of the memory exchange, without pipeline
  step_ms, peak_gib, gpu_busy_ms, and what the planner says: predicted_step_ms, predicted_peak_gib, step_error_percent,
                               peak_error_percent
  layers                       of a model that is cut to as many as fit
  fits                         0 where the planner says that a rank's memory is too small: not run
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError, UserError, exit_status
from megatron_ultramem.planning.clusters import Cluster
from megatron_ultramem.planning.evaluate import Evaluation, Evaluator, on_cluster
from megatron_ultramem.planning.memory import GIB
from megatron_ultramem.planning.this_machine import cluster_of_this_machine
from megatron_ultramem.quiet import quiet_dependencies
from megatron_ultramem.results import Row, write_results

ROOT = Path(__file__).resolve().parents[1]
MICRO_BATCHES = 4  # of a rank, per step
WARM_UP_STEPS, MEASURED_STEPS = 3, 3
TP2, PP2 = "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"
FP8 = "train.fp8.recipe=tensorwise"
FAST = "preset=throughput"


@dataclass(frozen=True)
class Family:
    """A recipe, the setting that says how many ranks share its tables or experts, and settings by way."""

    recipe: str
    shared_by: str
    ways: dict[str, list[str]]
    cut: bool = False  # to as many layers as fit


def _placed(placement: str, *more: str) -> list[str]:
    return [f"parallel.memory_placement={placement}", *more]


MEMORY, EXPERTS = "parallel.memory_parallel_size", "parallel.expert_parallel_size"
ALL_FIT = "parallel.exchange_capacity=1e9"  # static sizes, which CUDA graphs need
BESIDE_FFN = "parallel.overlap_exchange=true"
FAMILIES = [
    Family("ultramemv2_1b_7b", MEMORY, {
        "columns": _placed("columns", FAST, BESIDE_FFN),
        "rows": _placed("rows", FAST, BESIDE_FFN, ALL_FIT),
        "auto": _placed("auto", FAST),
        "columns_fp8": _placed("columns", FAST, FP8),
        "columns_tp2": _placed("columns", TP2),
        "columns_pp2": _placed("columns", PP2),
    }),
    Family("olmoe_1b_7b", EXPERTS, {"moe": [FAST], "moe_fp8": [FAST, FP8], "moe_tp2": [TP2], "moe_pp2": [PP2]}),
    Family("ultramemv2_2_5b_120b_top256", MEMORY, {"columns": _placed("columns", FAST), "rows": _placed("rows")}, True),
]  # fmt: skip
MOE = "olmoe_1b_7b"


@dataclass(frozen=True)
class Case:
    family: Family
    way: str
    ranks: int

    @property
    def name(self) -> str:
        return f"{self.family.recipe}/{self.way}_x{self.ranks}"

    def settings(self, recipes: Path, overrides: list[str]) -> list[str]:
        """All that is set on top of the recipe, but for layers."""
        way = self.family.ways[self.way]
        shared = self.ranks // (2 if PP2 in way else 1)
        if shared == 1:  # nothing to place
            way = [setting for setting in way if "placement" not in setting and setting not in (ALL_FIT, BESIDE_FFN)]
        micro = load_config(self.path(recipes), overrides).train.micro_batch_size
        data_parallel = self.ranks // (2 if TP2 in way or PP2 in way else 1)
        return [
            *overrides, *way, f"{self.family.shared_by}={shared}",
            f"train.global_batch_size={micro * MICRO_BATCHES * data_parallel}",
            f"train.steps={WARM_UP_STEPS + 2 * MEASURED_STEPS}", "schedule.warmup_steps=1",
            "schedule.decay_steps=null", "train.eval_steps=0", "checkpoint.load=none", "train.rampup_batch_size=[]",
        ]  # fmt: skip

    def path(self, recipes: Path) -> Path:
        return recipes / f"{self.family.recipe}.yaml"


def main(arguments: list[str] | None = None) -> int:
    args = _arguments(arguments)
    quiet_dependencies()
    return exit_status(lambda: measure_all(args) if args.child is None else _child(args))


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", help="numbers of ranks, commas between (default: powers of two up to the GPUs)")
    parser.add_argument("--ways", help="such as columns,moe (default: all)")
    parser.add_argument("--seconds", type=float, default=3600, help="after which no case is begun (default 3600)")
    parser.add_argument("--cluster", help="preset or .yaml file that describes this machine (default: by its GPU)")
    parser.add_argument("--recipes", type=Path, default=ROOT / "examples" / "configs", help="folder of the recipes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.setting=value", help="for all recipes")
    return parser.parse_args(arguments)


def cases(ranks: list[int], ways: list[str] | None) -> list[Case]:
    """The first ways of all families at all numbers of ranks, most ranks first, then the second ways, …"""
    known = [way for family in FAMILIES for way in family.ways]
    for way in ways or ():
        if way not in known:
            raise UserError(f"--ways {way}: legal: {', '.join(dict.fromkeys(known))}")
    found = [
        (place, -count, Case(family, way, count))
        for family in FAMILIES
        for place, way in enumerate(family.ways)
        for count in ranks
        if (ways is None or way in ways) and not (count == 1 and (TP2 in family.ways[way] or PP2 in family.ways[way]))
    ]
    return [case for *_, case in sorted(found, key=lambda entry: entry[:2])]


def measure_all(args: argparse.Namespace) -> None:
    """Runs the cases; what is measured is written at once, so that a case that fails costs no other."""
    gpus = max(1, torch.cuda.device_count())
    try:
        ranks = [int(count) for count in args.ranks.split(",")] if args.ranks else _powers(gpus)
    except ValueError as error:
        raise UserError(f"--ranks {args.ranks}: legal: numbers with commas between") from error
    cluster, began = cluster_of_this_machine(args.cluster), time.monotonic()
    rows: list[Row] = []
    for case in cases(ranks, args.ways.split(",") if args.ways else None):
        if time.monotonic() - began > args.seconds:
            print(f"{case.name}: no time left")
            continue
        rows += _in_processes(args, case, cluster)
        shown = rows + compared(rows)
        written = write_results(args.output, "scaling", shown)
    if rows:
        _show(shown)
        print(written)


def _powers(gpus: int) -> list[int]:
    return [2**power for power in range(gpus.bit_length()) if 2**power <= gpus]


def _in_processes(args: argparse.Namespace, case: Case, cluster: Cluster) -> list[Row]:
    """The rows of a case, measured by ranks of their own; says why there are none."""
    try:
        settings, plan = plan_of(args, case, cluster)
    except ConfigError as error:
        print(f"{case.name} is left out: {error}", flush=True)
        return []
    if not plan.memory.required <= cluster.usable_gib * GIB:
        needed = Row(case.name, "predicted_peak_gib", plan.memory.peak / GIB, "GiB")
        print(f"{case.name} is left out: {needed.value:.0f} GiB needed of {cluster.usable_gib:.0f}", flush=True)
        return [Row(case.name, "fits", 0.0, ""), needed]
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}",
                   __file__, f"--child={case.name}", f"--recipes={args.recipes}", f"--output={found}",
                   f"train.run_dir={folder}/run", *settings]  # fmt: skip
        if subprocess.run(command).returncode != 0:
            print(f"{case.name} failed; its ranks have said why", flush=True)
            return []
        measured = {row["metric"]: Row(**row) for row in json.loads(found.read_text())}
    predicted = {"step_ms": plan.time.seconds * 1e3, "peak_gib": plan.memory.peak / GIB}
    for metric, value in predicted.items():
        if metric in measured:
            real = measured[metric]
            measured[f"predicted_{metric}"] = Row(case.name, f"predicted_{metric}", value, real.unit)
            error_name = f"{metric.split('_')[0]}_error_percent"
            measured[error_name] = Row(case.name, error_name, 100 * (value / real.value - 1), "% of the measured")
    if case.family.cut:
        measured["layers"] = Row(case.name, "layers", plan.config.model.num_layers, "")
    return list(measured.values())


def plan_of(args: argparse.Namespace, case: Case, cluster: Cluster) -> tuple[list[str], Evaluation]:
    """The settings of a case and what the planner says of it; a model that is cut has the most layers that fit, or
    those of the smallest legal one. Raises ConfigError where no layout is legal."""
    settings = case.settings(args.recipes, args.overrides)
    whole = load_config(case.path(args.recipes), args.overrides).model.num_layers
    problem = ConfigError(f"no number of layers is legal with {' '.join(case.family.ways[case.way])}")
    last: tuple[list[str], Evaluation] | None = None
    for layers in range(whole, 0, -1) if case.family.cut else [whole]:
        try:
            config = load_config(case.path(args.recipes), [*settings, f"model.num_layers={layers}"])
        except ConfigError as error:
            problem = error
            continue
        last = [*settings, f"model.num_layers={layers}"], evaluate(config, case.ranks, cluster)
        if last[1].fits:
            break
    if last is None:
        raise problem
    return last


def evaluate(config: Config, ranks: int, cluster: Cluster) -> Evaluation:
    planned = on_cluster(config, cluster)
    assert config.model.vocab_size is not None, "the recipes name it"
    evaluator = Evaluator(planned, config.model.vocab_size, cluster)
    if problem := evaluator.problem(planned, ranks):
        raise ConfigError(problem)
    return evaluator.evaluate(planned, ranks)


def _child(args: argparse.Namespace) -> int:
    recipe, _, _ = args.child.partition("/")
    rows = measure(load_config(args.recipes / f"{recipe}.yaml", args.overrides), args.child)
    if rows:
        args.output.write_text(json.dumps([row.__dict__ for row in rows]))
    return 0


def measure(config: Config, case: str) -> list[Row]:
    """One case on this rank; rows on the first."""
    from megatron_ultramem.model.build import value_pools
    from megatron_ultramem.platform import prepare
    from megatron_ultramem.training.distributed import destroy_distributed
    from megatron_ultramem.training.exchange_figures import exchange_rows
    from megatron_ultramem.training.loop import train_step
    from megatron_ultramem.training.measure import covered_ms, forward_backward_only, median_seconds, trace
    from megatron_ultramem.training.setup import set_up

    prepare(config.train.device)
    run = set_up(config)
    for _ in range(WARM_UP_STEPS):
        train_step(run)
    step = median_seconds(run, lambda: train_step(run), MEASURED_STEPS)
    forward_backward = median_seconds(run, lambda: forward_backward_only(run, MICRO_BATCHES), MEASURED_STEPS)
    tokens = config.train.global_batch_size * config.data.sequence_length
    rows = [
        Row(case, "tokens_per_s", tokens / forward_backward, "tokens/s"),
        Row(case, "tokens_per_s_with_optimizer", tokens / step, "tokens/s"),
        Row(case, "step_ms", step * 1e3, "ms"),
    ]
    if run.platform.is_cuda:
        rows.append(Row(case, "peak_gib", torch.cuda.max_memory_allocated() / GIB, "GiB"))
        pools = value_pools(run.model)
        traffic = getattr(pools[0].placement, "traffic", None) if pools else None
        if traffic is not None:
            traffic.reset()
        spans = trace(run, lambda: forward_backward_only(run, 1))
        rows.append(Row(case, "gpu_busy_ms", covered_ms(spans), "ms per micro-batch"))
        if traffic is not None and config.parallel.pipeline_parallel_size == 1:  # stages send to each other too
            rows += exchange_rows(case, spans, traffic)
    main = run.is_main
    destroy_distributed()
    return rows if main else []


def compared(rows: list[Row]) -> list[Row]:
    """Scaling efficiency of every case, and its speed over the MoE's."""
    speed = {row.case: row.value for row in rows if row.metric == "tokens_per_s"}
    parts = {case: (case.rpartition("_x")[0], int(case.rpartition("_x")[2])) for case in speed}
    found = []
    for case, (way, ranks) in parts.items():
        recipe, _, _ = way.partition("/")
        family = next(family for family in FAMILIES if family.recipe == recipe)
        fewest = min(count for other, count in parts.values() if other == way)
        if ranks > fewest and not family.cut:
            ideal = speed[f"{way}_x{fewest}"] * ranks / fewest
            found.append(Row(case, "scaling_efficiency_percent", 100 * speed[case] / ideal, f"% of x{fewest}"))
        moe = [speed[other] for other, (name, count) in parts.items() if name.startswith(MOE) and count == ranks]
        if moe and recipe != MOE and not family.cut:
            found.append(Row(case, "times_the_moe", speed[case] / max(moe), "x"))
    return found


def _show(rows: list[Row]) -> None:
    shown = ["tokens_per_s", "scaling_efficiency_percent", "times_the_moe", "exchange_gb_s", "peak_gib",
             "peak_error_percent", "step_error_percent"]  # fmt: skip
    table = Table("case", *shown)
    values = {(row.case, row.metric): row.value for row in rows}
    for case in dict.fromkeys(row.case for row in rows):
        table.add_row(case, *(f"{values[case, name]:,.4g}" if (case, name) in values else "" for name in shown))
    Console(width=160).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
