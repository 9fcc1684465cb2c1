#!/usr/bin/env python3
"""Recipes on 1, 2, 4, ... GPUs of this machine: tokens/s, weak scaling, exchange, memory, and the planner's prediction
of each figure.

    python tools/bench_scaling.py data.paths='[data/corpus]'

Weak scaling: a step has four micro-batches for every rank; ranks that split a model have twice as many, of half the
work each. Every case is a run of its own, `<recipe>/<way>_x<ranks>`, in the order of importance, so that `--seconds`
may cut off the rest. Cases that leave GPUs free run beside each other, each on GPUs of its own; they share the host's
cores and the links' switch. Ways share tables (MoE: experts) among all ranks of a pipeline stage. On one rank there is
nothing to place, and `auto` comes to rows or columns: a case whose settings are those of another is not run again, and
has its figures. Some ways set variables of the environment; one that is set already stays as it is.

The 1B/7B recipes fit one GPU of 141 GB (128 GiB with the whole optimizer), so their efficiency is against one rank. Of
2.5B/120B not even the first four layers, which share tables, do: `cut` has as many layers as fit on these ranks, and
`cut_of_2` as many as fit on two, whose efficiency is against two. A model split by TP or PP has no case on one rank: it
is against the whole one there.

Rows (benchmarks/results/scaling_<hardware>.json):
  tokens_per_s                 forward and backward with the reduction of gradients, all ranks together
  tokens_per_s_with_optimizer  whole steps
  tokens_per_s_spread_percent, step_ms_spread_percent  the slowest of the measured times less the fastest, in % of their
                               median, of which the speed is
  scaling_efficiency_percent   of tokens_per_s; the unit says against what
  step_scaling_efficiency_percent  of whole steps, where more ranks also divide the optimizer's work
  times_the_moe, step_times_the_moe  tokens_per_s, and that of whole steps, over the fastest way of the MoE with as many
                               ranks, in whatever precision either of them is
  exchange_mb, exchange_gb_s, exchange_hidden_percent   of the memory exchange, without pipeline
  step_ms, peak_gib (of the fullest rank), gpu_busy_ms (of rank 0), and what the planner says: predicted_step_ms,
                               predicted_peak_gib, step_error_percent, peak_error_percent
  layers                       of a model that is cut
  fits                         0 where the planner says that a rank's memory is too small: not run

With --again nothing is measured: what a results file holds is predicted anew, on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table

from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError, UserError, exit_status
from megatron_ultramem.planning.memory import GIB
from megatron_ultramem.planning.scaling import (
    Planned,
    beside_the_plan,
    cases,
    plan_of,
    predicted_again,
)
from megatron_ultramem.planning.scaling_ratios import compared
from megatron_ultramem.planning.this_machine import cluster_of_this_machine
from megatron_ultramem.quiet import quiet_dependencies
from megatron_ultramem.results import Row, commit, results_path, write_json, write_results
from megatron_ultramem.side_by_side import Job, dealt, gpu_names, run_jobs, wait_for_turn

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_STEPS, MEASURED_STEPS = 3, 5
# NVLink multicast is not for machines that others share; what C++ says of ranks that were ended hides why they were.
QUIET = {"NCCL_NVLS_ENABLE": "0", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def main(arguments: list[str] | None = None) -> int:
    args = _arguments(arguments)
    quiet_dependencies()
    action = _child if args.child else again if args.again else measure_all
    return exit_status(lambda: action(args))


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", help="numbers of ranks, commas between (default: powers of two up to the GPUs)")
    parser.add_argument("--ways", help="such as columns,moe (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=3600, help="for all; what goes on then is ended (default 3600)"
    )
    parser.add_argument("--case-seconds", type=float, default=120, help="likewise for each case (default 120)")
    parser.add_argument("--cluster", help="preset or .yaml file that describes this machine (default: by its GPU)")
    parser.add_argument("--recipes", type=Path, default=ROOT / "examples" / "configs", help="folder of the recipes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--again", type=Path, help="results file to be predicted anew; nothing is measured")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.setting=value", help="for all recipes")
    return parser.parse_args(arguments)


def measure_all(args: argparse.Namespace) -> None:
    """Runs the cases; what is measured is written at once, so that a case that fails costs no other."""
    began, gpus = time.monotonic(), torch.cuda.device_count()
    ranks = _ranks(args.ranks, gpus)
    names, places = gpu_names(gpus) if gpus else None, gpus or max(ranks)
    cluster, chosen = cluster_of_this_machine(args.cluster), cases(ranks, args.ways.split(",") if args.ways else None)
    rows = _known(results_path(args.output, "scaling"))
    same: dict[tuple[object, ...], list[Planned]] = {}  # cases that one job runs
    jobs: list[Job] = []
    done: list[str] = []

    def found(case: str, figures: list[Row]) -> None:
        done.append(case)
        rows[case] = figures
        everything = compared([row for own in rows.values() for row in own])
        write_results(args.output, "scaling", everything, measured=done)

    def ended(job: Job, problem: str) -> None:
        answer = job.log.with_suffix(".json")
        if not answer.exists():
            print(f"{job.name} {problem}", *([job.last_words()] if job.began else []), sep="\n", flush=True)
            return
        content = json.loads(answer.read_text())
        print(f"{job.name}: {content['seconds']}", flush=True)
        measured = [Row(**row) for row in content["rows"]]
        for one in next(group for group in same.values() if group[0].case.name == job.name):
            figures = beside_the_plan(one.case, one.plan, measured)
            if one.case.way.cut is not None:
                figures.append(Row(one.case.name, "layers", one.plan.config.model.num_layers, ""))
            found(one.case.name, figures)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for case in chosen:
            try:
                planned = Planned(case, *plan_of(args.recipes, args.overrides, case, cluster))
            except ConfigError as error:
                print(f"{case.name} is left out: {error}", flush=True)
                continue
            if not planned.plan.fits:
                needed = Row(case.name, "predicted_peak_gib", planned.plan.memory.peak / GIB, "GiB")
                print(f"{case.name} is left out: {needed.value:.0f} GiB of {cluster.usable_gib:.0f}", flush=True)
                found(case.name, [Row(case.name, "fits", 0.0, ""), needed])
                continue
            if planned.identity not in same:
                jobs.append(_job(args, planned, Path(folder), places))
            if not same:  # its imports go on while the others are planned
                jobs[0].places = tuple(range(case.ranks))
                jobs[0].start(names)
            same.setdefault(planned.identity, []).append(planned)
        order = dealt([job.ranks for job in jobs], places)
        for number, own in order:
            jobs[number].places = own
        left = args.seconds - (time.monotonic() - began)
        in_order = [jobs[number] for number, _ in order]
        run_jobs(in_order, names, seconds=left, job_seconds=args.case_seconds, ended=ended)
    if not done:
        raise UserError("no case ran; their output says why")
    _show([row for row in compared([row for own in rows.values() for row in own]) if row.case in done])
    print(results_path(args.output, "scaling"))


def again(args: argparse.Namespace) -> None:
    """Puts what is predicted now beside what was measured; all else of the file stays."""
    if args.cluster is None:
        raise UserError("--again without --cluster; legal: that of the GPUs it was measured on")
    path, cluster = args.again, cluster_of_this_machine(args.cluster)
    rows = [row for own in _known(path).values() for row in own]
    if not rows:
        raise UserError(f"--again {path}: there is no such file; legal: results of this benchmark")
    rows = compared(predicted_again(rows, args.recipes, cluster))
    content = json.loads(path.read_text()) | {"rows": [row.__dict__ for row in rows], "predicted_at": commit()}
    write_json(path, content)
    _show(rows)


def _known(path: Path) -> dict[str, list[Row]]:
    """Rows of an earlier results file, by case."""
    found: dict[str, list[Row]] = {}
    for row in json.loads(path.read_text())["rows"] if path.exists() else ():
        found.setdefault(row["case"], []).append(Row(**row))
    return found


def _ranks(text: str | None, gpus: int) -> list[int]:
    try:
        found = [int(count) for count in text.split(",")] if text else _powers(max(1, gpus))
    except ValueError as error:
        raise UserError(f"--ranks {text}: legal: numbers with commas between") from error
    if min(found) < 1 or (gpus and max(found) > gpus):
        limit = f" to the {gpus} GPUs of this machine" if gpus else ""
        raise UserError(f"--ranks {text}: legal: from 1{limit}")
    return found


def _powers(gpus: int) -> list[int]:
    return [2**power for power in range(gpus.bit_length()) if 2**power <= gpus]


def _job(args: argparse.Namespace, planned: Planned, folder: Path, places: int) -> Job:
    case = planned.case
    log = folder / f"{case.name.replace('/', '_')}.log"
    command = [
        sys.executable, __file__, f"--child={case.name}", f"--recipes={args.recipes}",
        f"--output={log.with_suffix('.json')}", f"train.run_dir={log.with_suffix('')}", *planned.settings,
    ]  # fmt: skip
    defaults = QUIET | dict(case.way.environment)
    environment = {name: os.environ.get(name, value) for name, value in defaults.items()}
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // places))
    return Job(case.name, command, case.ranks, log, environment)


def _child(args: argparse.Namespace) -> None:
    """One rank of a case; ends the process."""
    began = time.monotonic()
    recipe, _, _ = args.child.partition("/")
    config = load_config(args.recipes / f"{recipe}.yaml", args.overrides)
    from megatron_ultramem.platform import has_transformer_engine, prepare

    if not torch.cuda.is_available():
        prepare(config.train.device)  # without a GPU Megatron is imported after this
    elif has_transformer_engine():
        import megatron.core.extensions.transformer_engine  # noqa: F401  takes seconds, as does the next

    import megatron_ultramem.training.loop  # noqa: F401

    clock = Clock(began)
    clock.lap("imports")
    wait_for_turn()
    clock.lap("waiting")
    prepare(config.train.device)
    rows = measure(config, args.child, clock)
    if torch.distributed.get_rank() == 0:
        part = args.output.with_suffix(".part")
        part.write_text(json.dumps({"rows": [row.__dict__ for row in rows], "seconds": str(clock)}))
        part.replace(args.output)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # an orderly end of graphs and communicators takes seconds of all GPUs, and nothing depends on it


class Clock:
    """Seconds of the parts of a case."""

    def __init__(self, began: float) -> None:
        self._last, self._parts = began, dict[str, float]()

    def lap(self, part: str) -> None:
        now = time.monotonic()
        self._parts[part], self._last = now - self._last, now

    def __str__(self) -> str:
        return ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self._parts.items())


def measure(config: Config, case: str, clock: Clock) -> list[Row]:
    """One case on this rank, whose process groups are left open."""
    from megatron.core import parallel_state

    from megatron_ultramem.model.build import value_pools
    from megatron_ultramem.training.exchange_figures import exchange_rows
    from megatron_ultramem.training.loop import train_step
    from megatron_ultramem.training.measure import covered_ms, forward_backward_only, speed_rows, timing, trace
    from megatron_ultramem.training.setup import set_up

    run = set_up(config)
    clock.lap("set-up")
    for _ in range(WARM_UP_STEPS):
        train_step(run)
    clock.lap("warm-up")
    step = timing(run, lambda: train_step(run), MEASURED_STEPS)
    train = config.train
    count = train.global_batch_size // (train.micro_batch_size * parallel_state.get_data_parallel_world_size())
    forward_backward = timing(run, lambda: forward_backward_only(run, count), MEASURED_STEPS)
    clock.lap("measuring")
    tokens = train.global_batch_size * config.data.sequence_length
    rows = speed_rows(case, tokens, step=step, forward_backward=forward_backward)
    if run.platform.is_cuda:
        peak = torch.tensor(torch.cuda.max_memory_allocated(), device=run.platform.device)
        torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
        rows.append(Row(case, "peak_gib", peak.item() / GIB, "GiB"))
        pools = value_pools(run.model)
        traffic = getattr(pools[0].placement, "traffic", None) if pools else None
        if traffic is not None:
            traffic.reset()
        spans = trace(run, lambda: forward_backward_only(run, 1))
        rows.append(Row(case, "gpu_busy_ms", covered_ms(spans), "ms per micro-batch"))
        if traffic is not None and config.parallel.pipeline_parallel_size == 1:  # stages send to each other too
            rows += exchange_rows(case, spans, traffic)
        clock.lap("trace")
    return rows


def _show(rows: list[Row]) -> None:
    shown = ["tokens_per_s", "scaling_efficiency_percent", "times_the_moe", "exchange_gb_s", "peak_gib",
             "peak_error_percent", "step_error_percent"]  # fmt: skip
    table = Table(Column("case", no_wrap=True), *shown)
    values = {(row.case, row.metric): row.value for row in rows}
    for case in dict.fromkeys(row.case for row in rows):
        table.add_row(case, *(f"{values[case, name]:,.4g}" if (case, name) in values else "" for name in shown))
    Console(width=180).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
