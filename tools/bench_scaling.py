#!/usr/bin/env python3
"""Recipes on 1, 2, 4, ... GPUs of this machine: tokens/s, weak scaling, exchange, memory, and the planner's prediction
of each figure.

    python tools/bench_scaling.py data.paths='[data/corpus]'

Weak scaling: every rank has the same number of micro-batches, however many ranks there are. Every case is a run of its
own, `<recipe>/<way>_x<ranks>`, in the order of importance, so that `--seconds` may cut off the rest. Cases that leave
GPUs free run beside each other, each on GPUs of its own; they share the host's cores and the links' switch. Ways share
tables (MoE: experts) among all ranks of a pipeline stage. On one rank there is nothing to place, and `auto` comes to
rows or columns: a case whose settings are those of another is not run again, and has its figures.

The 1B/7B recipes fit one GPU of 141 GB (128 GiB with the whole optimizer), so their efficiency is against one rank. Of
2.5B/120B not even the first four layers, which share tables, do: `cut` has as many layers as fit on these ranks, and
`cut_of_2` as many as fit on two, whose efficiency is against two.

Rows (benchmarks/results/scaling_<hardware>.json):
  tokens_per_s                 forward and backward with the reduction of gradients, all ranks together
  tokens_per_s_with_optimizer  whole steps
  scaling_efficiency_percent   of tokens_per_s, against the same way on the fewest ranks
  step_scaling_efficiency_percent  of whole steps, where more ranks also divide the optimizer's work
  times_the_moe                tokens_per_s over the fastest way of the MoE with as many ranks
  exchange_mb, exchange_gb_s, exchange_hidden_percent   of the memory exchange, without pipeline
  step_ms, peak_gib, gpu_busy_ms, and what the planner says: predicted_step_ms, predicted_peak_gib, step_error_percent,
                               peak_error_percent
  layers                       of a model that is cut
  fits                         0 where the planner says that a rank's memory is too small: not run
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
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
from megatron_ultramem.side_by_side import Job, dealt, gpu_names, run_jobs, wait_for_turn

ROOT = Path(__file__).resolve().parents[1]
MICRO_BATCHES = 4  # of a rank, per step
WARM_UP_STEPS, MEASURED_STEPS = 3, 3
FAST = "preset=throughput"
FP8 = "preset=throughput_fp8"  # products and tables
TP2, PP2 = "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"
PLACEMENT = "parallel.memory_placement="
ALL_FIT = "parallel.exchange_capacity=1e9"  # static sizes, which CUDA graphs need
BESIDE_FFN = "parallel.overlap_exchange=true"
ROUTER, ALLGATHER = "model.moe.router_fusion=true", "model.moe.dispatcher=allgather"
# Of attention and routers; Megatron's do not go with weight gradients that are fused into their GEMMs.
GRAPHS = ("train.cuda_graphs=layers", "train.fused_weight_gradients=false")
# The experts' sizes follow the router, and no two micro-batches ask for the same: without it memory falls to pieces.
SEGMENTS = ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
CUTLASS = ("NVTE_USE_CUTLASS_GROUPED_GEMM", "1")  # one launch for all experts, where cuBLAS has one for each


@dataclass(frozen=True)
class Way:
    """Of running a recipe: settings, and variables of the environment. `cut`: to as many layers as fit on so many ranks
    (0: on those of the case)."""

    recipe: str
    name: str
    settings: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    cut: int | None = None

    @property
    def halves(self) -> bool:
        """Whether two ranks hold a model's parts."""
        return TP2 in self.settings or PP2 in self.settings

    @property
    def least_ranks(self) -> int:
        return max(2 if self.halves else 1, self.cut or 1)


MEMORY, MOE, LARGE = "ultramemv2_1b_7b", "olmoe_1b_7b", "ultramemv2_2_5b_120b_top256"
SHARED_BY = {
    MEMORY: "parallel.memory_parallel_size",
    MOE: "parallel.expert_parallel_size",
    LARGE: "parallel.memory_parallel_size",
}
COLUMNS, ROWS = f"{PLACEMENT}columns", f"{PLACEMENT}rows"
WAYS = [  # most important first
    Way(MEMORY, "columns", (FAST, COLUMNS)),
    Way(MOE, "moe", (FAST, ROUTER), (SEGMENTS,)),
    Way(MOE, "moe_cutlass", (FAST, ROUTER), (SEGMENTS, CUTLASS)),
    Way(MEMORY, "columns_overlap", (FAST, COLUMNS, BESIDE_FFN)),
    Way(MEMORY, "rows", (FAST, ROWS, ALL_FIT)),
    Way(LARGE, "cut_columns", (FAST, COLUMNS), cut=0),
    Way(MEMORY, "columns_fp8", (FP8, COLUMNS)),
    Way(MOE, "moe_allgather_cutlass", (FAST, ROUTER, ALLGATHER), (SEGMENTS, CUTLASS)),
    Way(MOE, "moe_fp8", (FP8, ROUTER), (SEGMENTS,)),
    Way(MEMORY, "columns_pp2", (FAST, COLUMNS, PP2)),
    Way(MEMORY, "columns_tp2", (FAST, COLUMNS, TP2)),
    Way(MOE, "moe_graphs_cutlass", (FAST, ROUTER, *GRAPHS), (SEGMENTS, CUTLASS)),
    Way(LARGE, "cut_of_2_columns", (FAST, COLUMNS), cut=2),
    Way(MEMORY, "auto", (FAST, f"{PLACEMENT}auto")),
    Way(MOE, "moe_pp2", (FAST, ROUTER, PP2), (SEGMENTS,)),
    Way(MOE, "moe_tp2", (FAST, ROUTER, TP2), (SEGMENTS,)),
    Way(LARGE, "cut_rows", (FAST, ROWS, ALL_FIT), cut=0),
    Way(LARGE, "cut_auto", (FAST, f"{PLACEMENT}auto"), cut=0),
]  # fmt: skip
# A way on its second number of ranks is as important as the way so many places further down on its first.
STEP_DOWN = 2


@dataclass(frozen=True)
class Case:
    way: Way
    ranks: int

    @property
    def name(self) -> str:
        return f"{self.way.recipe}/{self.way.name}_x{self.ranks}"

    def settings(self, recipes: Path, overrides: list[str]) -> list[str]:
        """All that is set on top of the recipe, but for layers."""
        way = list(self.way.settings)
        replicas = self.ranks // (2 if self.way.halves else 1)
        shared = self.ranks // (2 if PP2 in way else 1)
        if shared == 1:  # nothing to place
            way = [one for one in way if not one.startswith(PLACEMENT) and one not in (ALL_FIT, BESIDE_FFN)]
        micro = _recipe(self.path(recipes), tuple(overrides)).train.micro_batch_size
        return [
            *overrides, *way, f"{SHARED_BY[self.way.recipe]}={shared}",
            f"train.global_batch_size={micro * MICRO_BATCHES * replicas}",
            f"train.steps={WARM_UP_STEPS + 2 * MEASURED_STEPS}", "schedule.warmup_steps=1",
            "schedule.decay_steps=null", "train.eval_steps=0", "checkpoint.load=none", "train.rampup_batch_size=[]",
        ]  # fmt: skip

    def path(self, recipes: Path) -> Path:
        return recipes / f"{self.way.recipe}.yaml"


@functools.cache
def _recipe(path: Path, overrides: tuple[str, ...]) -> Config:
    return load_config(path, overrides)


@dataclass(frozen=True)
class Planned:
    """A case that can run: its settings in full, and what the planner says of it."""

    case: Case
    settings: list[str]
    plan: Evaluation

    @property
    def identity(self) -> tuple[object, ...]:
        """Cases of which it is the same do the same."""
        placed = f"{PLACEMENT}{self.plan.layout.placement.placement}"
        settings = {placed if one.startswith(PLACEMENT) else one for one in self.settings}
        return self.case.path(Path()), self.case.ranks, self.case.way.environment, frozenset(settings)


def main(arguments: list[str] | None = None) -> int:
    args = _arguments(arguments)
    quiet_dependencies()
    return exit_status(lambda: measure_all(args) if args.child is None else _child(args))


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
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.setting=value", help="for all recipes")
    return parser.parse_args(arguments)


def cases(ranks: list[int], ways: list[str] | None) -> list[Case]:
    """Most important first: of every way the most ranks, then the fewest, then those between; of those that split a
    model beside sharing its tables the fewest first, as two such cases run beside each other."""
    known = list(dict.fromkeys(way.name for way in WAYS))
    for name in ways or ():
        if name not in known:
            raise UserError(f"--ways {name}: legal: {', '.join(known)}")
    rising = sorted(ranks)
    most_first = [*rising[-1:], *rising[:1], *rising[-2:0:-1]] if len(rising) > 1 else rising
    found = [
        (place + STEP_DOWN * number, Case(way, count))
        for place, way in enumerate(WAYS)
        for number, count in enumerate(
            [count for count in (rising if way.halves else most_first) if count >= way.least_ranks]
        )
        if ways is None or way.name in ways
    ]
    return [case for _, case in sorted(found, key=lambda entry: entry[0])]


def measure_all(args: argparse.Namespace) -> None:
    """Runs the cases; what is measured is written at once, so that a case that fails costs no other."""
    began, gpus = time.monotonic(), torch.cuda.device_count()
    ranks = _ranks(args.ranks, gpus)
    names, places = gpu_names(gpus) if gpus else None, gpus or max(ranks)
    cluster = cluster_of_this_machine(args.cluster)
    rows: list[Row] = []
    same: dict[tuple[object, ...], list[Planned]] = {}  # cases that one job runs
    jobs: list[Job] = []

    def ended(job: Job, problem: str) -> None:
        answer = job.log.with_suffix(".json")
        if not answer.exists():
            print(f"{job.name} {problem}", job.last_words(), sep="\n", flush=True)
            return
        content = json.loads(answer.read_text())
        print(f"{job.name}: {content['seconds']}", flush=True)
        case, *others = next(group for group in same.values() if group[0].case.name == job.name)
        measured = beside_the_plan(case, [Row(**row) for row in content["rows"]])
        for one in (case, *others):
            rows.extend(dataclasses.replace(row, case=one.case.name) for row in measured)
        write_results(args.output, "scaling", rows + compared(rows))

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for case in cases(ranks, args.ways.split(",") if args.ways else None):
            planned = _planned(args, case, cluster)
            if not isinstance(planned, Planned):
                rows += planned
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
    if not rows:
        raise UserError("no case ran; their output says why")
    _show(rows + compared(rows))
    print(write_results(args.output, "scaling", rows + compared(rows)))


def _ranks(text: str | None, gpus: int) -> list[int]:
    try:
        found = [int(count) for count in text.split(",")] if text else _powers(max(1, gpus))
    except ValueError as error:
        raise UserError(f"--ranks {text}: legal: numbers with commas between") from error
    if min(found) < 1 or (gpus and max(found) > gpus):
        raise UserError(f"--ranks {text}: legal: from 1 to the {gpus or 'processors'} of this machine")
    return found


def _powers(gpus: int) -> list[int]:
    return [2**power for power in range(gpus.bit_length()) if 2**power <= gpus]


def _planned(args: argparse.Namespace, case: Case, cluster: Cluster) -> Planned | list[Row]:
    """The case, or rows that stand for it if it cannot run; says why."""
    try:
        settings, plan = plan_of(args, case, cluster)
    except ConfigError as error:
        print(f"{case.name} is left out: {error}", flush=True)
        return []
    if plan.memory.required <= cluster.usable_gib * GIB:
        return Planned(case, settings, plan)
    needed = Row(case.name, "predicted_peak_gib", plan.memory.peak / GIB, "GiB")
    print(f"{case.name} is left out: {needed.value:.0f} GiB needed of {cluster.usable_gib:.0f}", flush=True)
    return [Row(case.name, "fits", 0.0, ""), needed]


def _job(args: argparse.Namespace, planned: Planned, folder: Path, places: int) -> Job:
    case = planned.case
    log = folder / f"{case.name.replace('/', '_')}.log"
    command = [
        sys.executable, __file__, f"--child={case.name}", f"--recipes={args.recipes}",
        f"--output={log.with_suffix('.json')}", f"train.run_dir={log.with_suffix('')}", *planned.settings,
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // places))}
    return Job(case.name, command, case.ranks, log, dict(case.way.environment) | threads)


def beside_the_plan(planned: Planned, rows: list[Row]) -> list[Row]:
    """What was measured of a case, with what the planner says of it."""
    case, plan, found = planned.case, planned.plan, list(rows)
    predicted = {"step_ms": plan.time.seconds * 1e3, "peak_gib": plan.memory.peak / GIB}
    for real in rows:
        if (value := predicted.get(real.metric)) is not None:
            error_name = f"{real.metric.split('_')[0]}_error_percent"
            found.append(Row(case.name, f"predicted_{real.metric}", value, real.unit))
            found.append(Row(case.name, error_name, 100 * (value / real.value - 1), "% of the measured"))
    if case.way.cut is not None:
        found.append(Row(case.name, "layers", plan.config.model.num_layers, ""))
    return found


def plan_of(args: argparse.Namespace, case: Case, cluster: Cluster) -> tuple[list[str], Evaluation]:
    """The settings of a case and what the planner says of it; a model that is cut has the most layers that fit, or
    those of the smallest legal one. Raises ConfigError where no layout is legal."""
    settings = case.settings(args.recipes, args.overrides)
    config = load_config(case.path(args.recipes), settings)
    model = config.model
    if case.way.cut and case.way.cut != case.ranks:
        _, smaller = plan_of(args, Case(case.way, case.way.cut), cluster)
        choices = [smaller.config.model.num_layers]
    elif case.way.cut is not None:
        choices = list(range(model.num_layers, 0, -(model.memory.share_size if model.memory.sharing == "block" else 1)))
    else:
        choices = [model.num_layers]
    problem: ConfigError | None = None
    last: Evaluation | None = None
    for layers in choices:
        model = dataclasses.replace(model, num_layers=layers)
        try:
            last = evaluate(dataclasses.replace(config, model=model), case.ranks, cluster)
        except ConfigError as error:
            problem = error
            continue
        if last.fits:
            break
    if last is None:
        assert problem is not None
        raise problem
    return [*settings, f"model.num_layers={last.config.model.num_layers}"], last


def evaluate(config: Config, ranks: int, cluster: Cluster) -> Evaluation:
    planned = on_cluster(config, cluster)
    assert config.model.vocab_size is not None, "the recipes name it"
    evaluator = Evaluator(planned, config.model.vocab_size, cluster)
    if problem := evaluator.problem(planned, ranks):
        raise ConfigError(problem)
    return evaluator.evaluate(planned, ranks)


def _child(args: argparse.Namespace) -> int:
    """One rank of a case."""
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
    from megatron_ultramem.model.build import value_pools
    from megatron_ultramem.training.exchange_figures import exchange_rows
    from megatron_ultramem.training.loop import train_step
    from megatron_ultramem.training.measure import covered_ms, forward_backward_only, median_seconds, trace
    from megatron_ultramem.training.setup import set_up

    run = set_up(config)
    clock.lap("set-up")
    for _ in range(WARM_UP_STEPS):
        train_step(run)
    clock.lap("warm-up")
    step = median_seconds(run, lambda: train_step(run), MEASURED_STEPS)
    forward_backward = median_seconds(run, lambda: forward_backward_only(run, MICRO_BATCHES), MEASURED_STEPS)
    clock.lap("measuring")
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
        clock.lap("trace")
    return rows


def compared(rows: list[Row]) -> list[Row]:
    """Scaling efficiency of every case, and its speed over the MoE's."""
    values = {(row.case, row.metric): row.value for row in rows}
    parts = {case: (case.rpartition("_x")[0], int(case.rpartition("_x")[2])) for case, _ in values}
    own_layers = {f"{way.recipe}/{way.name}" for way in WAYS if way.cut == 0}
    found = []
    for case, (way, ranks) in parts.items():
        for metric, name in (
            ("tokens_per_s", "scaling_efficiency_percent"),
            ("tokens_per_s_with_optimizer", "step_scaling_efficiency_percent"),
        ):
            known = {parts[other][1] for other, one in values if one == metric and parts[other][0] == way}
            if (case, metric) in values and ranks > min(known) and way not in own_layers:
                ideal = values[f"{way}_x{min(known)}", metric] * ranks / min(known)
                found.append(Row(case, name, 100 * values[case, metric] / ideal, f"% of x{min(known)}"))
        moe = [
            values[other, "tokens_per_s"]
            for other, (name, count) in parts.items()
            if name.startswith(MOE) and count == ranks and (other, "tokens_per_s") in values
        ]
        if moe and way.startswith(MEMORY) and (case, "tokens_per_s") in values:
            found.append(Row(case, "times_the_moe", values[case, "tokens_per_s"] / max(moe), "x"))
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
