#!/usr/bin/env python3
"""Trains one recipe in bf16, with FP8 matrix products and with FP8 tables on the same data, and compares the losses.

    python tools/fp8_curves.py --config examples/configs/ultramemv2_227m_1b.yaml --steps 300 data.paths='[data/corpus]'

Every variant is a process of its own for each of `--seeds`, on one of `--gpus`, and starts from the same weights; one
that fails costs the others nothing. Steps have `--micro-batches` micro-batches. Results go to
benchmarks/results/fp8_curves_<hardware>.json after every run. The case `<variant>/seed_<seed>` is one run: loss and
gradient norm of every tenth step, the mean loss of the last twenty. The case `<variant>` has the means over the seeds,
and how far the mean loss of the last twenty steps is from that of bf16 with the same seeds, in per cent. Single runs
part early and wander about each other; with several seeds `loss_against_bf16_error` is the standard error of that
distance.

Runs of earlier calls that are in the file count too, if they had a recipe and data of the same names, the same steps
and settings, but for CUDA graphs and names of folders: further seeds or variants may be measured another day.
tools/draw_fp8_curves.py draws the file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import UserError
from megatron_ultramem.platform import prepare
from megatron_ultramem.quiet import quiet_dependencies
from megatron_ultramem.results import Row, results_path, write_results

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
VARIANTS = {
    "bf16": [],
    "fp8_tensorwise": ["train.fp8.recipe=tensorwise"],
    "fp8_tables": ["model.memory.table_read=fp8"],
    "fp8_delayed": ["train.fp8.recipe=delayed"],
    "fp8_blockwise": ["train.fp8.recipe=blockwise"],
    "fp8_tensorwise_ends_bf16": ["train.fp8.recipe=tensorwise", "train.fp8.first_last_layers_bf16=true"],
    "fp8_tensorwise_projections_bf16": ["train.fp8.recipe=tensorwise", "train.fp8.memory_projections=false"],
    "fp8_tensorwise_tables": ["train.fp8.recipe=tensorwise", "model.memory.table_read=fp8"],
}
LAST = 20  # steps whose mean loss is compared
EVERY = 10
SEED = "/seed_"
SAME_NUMBERS = ("train.cuda_graphs", "train.run_dir", "data.cache_dir")  # but for rounding
Curve = dict[str, list[float]]  # losses and gradient norms of a run
Figures = dict[str, float]  # by metric, what is kept of a run
Runs = dict[str, dict[str, Figures]]  # by variant and seed
UNITS = {"loss": "nats/token", "not": "steps", "grad": ""}  # by the first word of a metric


def main() -> int:
    parser = _parser()
    args = parser.parse_args()
    names = args.variants.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"--variants {unknown[0]}: legal: {', '.join(VARIANTS)}")
    seeds = args.seeds.split(",")
    if not all(seed.isdecimal() for seed in seeds):
        parser.error(f"--seeds {args.seeds}: legal: numbers with commas between")
    if args.steps < LAST:
        parser.error(f"--steps {args.steps}: legal: at least {LAST}")
    if args.only:
        return _train(args)
    gpus = (args.gpus or os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0]  # results are those of one GPU, however many there are
    measured: Runs = {}
    failed = []
    runs = [f"{name}:{seed}" for seed in seeds for name in names]
    for run, curve in _all_curves(runs, gpus if args.gpus else gpus[:1], args.limit):
        name, _, seed = run.partition(":")
        if isinstance(curve, Exception):
            failed.append(f"{name}, seed {seed}: {type(curve).__name__}")
            continue
        measured.setdefault(name, {})[seed] = figures_of(curve)
        cases = {*measured, *(f"{of}{SEED}{one}" for of, by_seed in measured.items() for one in by_seed)}
        # Read anew each time: another call may have written on other GPUs.
        rows = rows_of(together(_known(args), measured))
        path = write_results(args.output, "fp8_curves", rows, measured=cases)
        print(f"{name}, seed {seed}: {path}", flush=True)
    for row in rows_of(together(_known(args), measured)):
        if SEED not in row.case and "_step_" not in row.metric:
            print(f"{row.case:24s} {row.metric:24s} {row.value:10.4f} {row.unit}")
    for failure in failed:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300, help="steps of training (default 300)")
    parser.add_argument("--micro-batches", type=int, default=1, help="per step (default 1)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--seeds", default="1234", help="of weights and of the data's order (default: %(default)s)")
    parser.add_argument("--gpus", help="such as 0,1,2,3: that many runs at a time (default: one, on the first GPU)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for a run (default 600)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # in a process of its own: train this variant:seed
    parser.add_argument("overrides", nargs="*", metavar="section.setting=value")
    return parser


def _all_curves(runs: list[str], gpus: list[str], limit: float) -> Iterator[tuple[str, Curve | Exception]]:
    """Losses and gradient norms of the runs as they end, or why there are none; one at a time on every GPU."""
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for gpu in gpus:
        free.put(gpu)

    def train(run: str) -> Curve:
        gpu = free.get()
        try:
            command = [sys.executable, *sys.argv, "--only", run]
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit, env=environment)
            curve: Curve = json.loads(done.stdout.splitlines()[-1])
            return curve
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(len(gpus)) as workers:
        futures = {workers.submit(train, run): run for run in runs}
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
                    yield futures[future], error
        finally:
            workers.shutdown(wait=False, cancel_futures=True)  # interrupted: nothing new begins


def figures_of(curve: Curve) -> Figures:
    """What is kept of a run."""
    losses, norms = curve["losses"], curve["grad_norms"]
    steps = sorted({1, len(losses), *range(EVERY, len(losses), EVERY)})
    return {
        **{f"loss_step_{step}": losses[step - 1] for step in steps},
        **{f"grad_norm_step_{step}": norms[step - 1] for step in steps},
        "loss_last_20": statistics.mean(losses[-LAST:]),
        "grad_norm_median": statistics.median(norms),
        "not_finite": sum(not math.isfinite(loss) for loss in losses),
    }


def together(known: Runs, measured: Runs) -> Runs:
    """Both; what is measured again counts in its new form."""
    return {name: {**known.get(name, {}), **measured.get(name, {})} for name in {**known, **measured}}


def rows_of(runs: Runs) -> list[Row]:
    """Every run, and means over the seeds of each variant (of steps whose loss is not finite: the sum)."""
    rows = []
    for name, by_seed in runs.items():
        for seed, figures in by_seed.items():
            rows += [_row(f"{name}{SEED}{seed}", metric, value) for metric, value in figures.items()]
    for name, by_seed in runs.items():
        for metric in next(iter(by_seed.values())):
            values = [figures[metric] for figures in by_seed.values()]
            rows.append(_row(name, metric, sum(values) if metric == "not_finite" else statistics.mean(values)))
        rows.append(Row(name, "seeds", len(by_seed), ""))
        rows += _against_bf16(name, by_seed, runs.get("bf16", {}))
    return rows


def _row(case: str, metric: str, value: float) -> Row:
    return Row(case, metric, value, UNITS[metric.partition("_")[0]])


def _against_bf16(name: str, by_seed: dict[str, Figures], bf16: dict[str, Figures]) -> Iterator[Row]:
    """The distance from bf16, seed by seed where both have ended."""
    end = "loss_last_20"
    distances = [100 * (by_seed[seed][end] / bf16[seed][end] - 1) for seed in by_seed if seed in bf16]
    if distances:
        yield Row(name, "loss_against_bf16", statistics.mean(distances), "%")
    if len(distances) > 1:
        yield Row(name, "loss_against_bf16_error", statistics.stdev(distances) / len(distances) ** 0.5, "%")


def _known(args: argparse.Namespace) -> Runs:
    """The runs of earlier calls that count beside those of this one."""
    path = results_path(args.output, "fp8_curves")
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    earlier = content.get("earlier", [])
    elsewhere = {case for call in earlier for case in call["cases"]}
    last = {"cases": {row["case"] for row in content["rows"]} - elsewhere, "command": content["command"]}
    alike: set[str] = set()
    for call in [*earlier, last]:
        own = {case for case in call["cases"] if SEED in case}
        alike |= own if own and _same_runs(call["command"], args) else set()
    runs: Runs = {}
    for row in content["rows"]:
        name, _, seed = row["case"].partition(SEED)
        if row["case"] in alike:
            runs.setdefault(name, {}).setdefault(seed, {})[row["metric"]] = row["value"]
    return runs


def _same_runs(command: str, args: argparse.Namespace) -> bool:
    """Whether a call trained, under a seed, what one with `args` trains."""

    def of(args: argparse.Namespace) -> tuple[Any, ...]:
        settings = {name: value for name, _, value in (setting.partition("=") for setting in args.overrides)}
        data = [Path(path).name for path in settings.pop("data.paths", "").strip("[]").split(",")]
        settings = {name: value for name, value in settings.items() if name not in SAME_NUMBERS}
        return args.config.name, args.steps, args.micro_batches, data, settings

    then = _parser().parse_args(shlex.split(command)[2:])  # without python and this file
    return of(then) == of(args)


def _train(args: argparse.Namespace) -> int:
    """Prints the losses and gradient norms of one variant as a line of JSON."""
    quiet_dependencies()
    variant, _, seed = args.only.partition(":")
    micro = load_config(args.config, check=False).train.micro_batch_size
    settings = [
        f"train.steps={args.steps}", f"train.global_batch_size={micro * args.micro_batches}", "train.eval_steps=0",
        f"schedule.warmup_steps={args.steps // 20}", "checkpoint.load=none",
        f"train.run_dir=runs/fp8_curves/{variant}_{seed}", f"train.seed={seed}",
        f"data.seed={seed}", *args.overrides, *VARIANTS[variant],
    ]  # fmt: skip
    try:
        config = load_config(args.config, settings)
        prepare(config.train.device)
        from megatron_ultramem.training.distributed import destroy_distributed
        from megatron_ultramem.training.loop import train_step
        from megatron_ultramem.training.setup import set_up

        run = set_up(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    losses, norms = [], []
    for _ in range(args.steps):
        metrics = train_step(run)
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    print(json.dumps({"losses": losses, "grad_norms": norms}), flush=True)
    destroy_distributed()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
