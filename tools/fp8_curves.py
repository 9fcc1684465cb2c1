#!/usr/bin/env python3
"""Trains one recipe in bf16, with FP8 matrix products and with FP8 tables on the same data, and compares the losses.

    python tools/fp8_curves.py --config examples/configs/ultramemv2_227m_1b.yaml --steps 300 data.paths='[data/corpus]'

Every variant is a process of its own for each of `--seeds`, on one GPU, and starts from the same weights; one that
fails costs the others nothing. Steps have `--micro-batches` micro-batches. Results go to
benchmarks/results/fp8_curves_<hardware>.json after every run: the case is the variant, with loss and gradient norm of
every tenth step, means over the seeds, and how far the mean loss of the last twenty steps is from that of bf16 with the
same seeds (of this call, or of the file), in per cent. Single runs part early and wander about each other; with several
seeds `loss_against_bf16_error` is the standard error of that distance.
tools/draw_fp8_curves.py draws the file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import UserError
from megatron_ultramem.platform import prepare
from megatron_ultramem.quiet import quiet_dependencies
from megatron_ultramem.results import Row, short_hardware_name, write_results

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
VARIANTS = {
    "bf16": [],
    "fp8_tensorwise": ["train.fp8.recipe=tensorwise"],
    "fp8_tables": ["model.memory.table_read=fp8"],
    "fp8_delayed": ["train.fp8.recipe=delayed"],
    "fp8_blockwise": ["train.fp8.recipe=blockwise"],
    "fp8_tensorwise_tables": ["train.fp8.recipe=tensorwise", "model.memory.table_read=fp8"],
}
LAST = 20  # steps whose mean loss is compared
EVERY = 10
Curve = dict[str, list[float]]  # losses and gradient norms of a run


def main() -> int:
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
    curves: dict[str, dict[str, Curve]] = {}
    failed = []
    runs = [f"{name}:{seed}" for seed in seeds for name in names]
    for run, curve in _all_curves(runs, gpus if args.gpus else gpus[:1], args.limit):
        name, _, seed = run.partition(":")
        if isinstance(curve, Exception):
            failed.append(f"{name}, seed {seed}: {type(curve).__name__}")
            continue
        curves.setdefault(name, {})[seed] = curve
        rows = rows_of(curves, _known_end(args.output))
        print(f"{name}, seed {seed}: {write_results(args.output, 'fp8_curves', rows)}", flush=True)
    for row in rows_of(curves, _known_end(args.output)):
        if not row.metric.startswith(("loss_step", "grad_norm_step")):
            print(f"{row.case:24s} {row.metric:24s} {row.value:10.4f} {row.unit}")
    for failure in failed:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failed else 0


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
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
                yield futures[future], error


def rows_of(curves: dict[str, dict[str, Curve]], bf16_end: float | None) -> list[Row]:
    """What is kept of losses and gradient norms, by variant and seed. bf16_end: its mean loss at the end, if not in
    `curves`."""
    ends = {
        name: {seed: statistics.mean(curve["losses"][-LAST:]) for seed, curve in by_seed.items()}
        for name, by_seed in curves.items()
    }
    rows = []
    for name, by_seed in curves.items():
        losses = [statistics.mean(at) for at in zip(*(curve["losses"] for curve in by_seed.values()), strict=True)]
        norms = [statistics.mean(at) for at in zip(*(curve["grad_norms"] for curve in by_seed.values()), strict=True)]
        steps = len(losses)
        for step in sorted({1, steps, *range(EVERY, steps, EVERY)}):
            rows.append(Row(name, f"loss_step_{step}", losses[step - 1], "nats/token"))
            rows.append(Row(name, f"grad_norm_step_{step}", norms[step - 1], ""))
        rows.append(Row(name, "seeds", len(by_seed), ""))
        rows.append(Row(name, "loss_last_20", statistics.mean(ends[name].values()), "nats/token"))
        rows.append(Row(name, "grad_norm_median", statistics.median(norms), ""))
        not_finite = sum(not math.isfinite(loss) for curve in by_seed.values() for loss in curve["losses"])
        rows.append(Row(name, "not_finite", not_finite, "steps"))
        rows += _against_bf16(name, ends[name], ends.get("bf16", {}), bf16_end)
    return rows


def _against_bf16(
    name: str, ends: dict[str, float], bf16_ends: dict[str, float], bf16_end: float | None
) -> Iterator[Row]:
    """The distance from bf16, seed by seed where both have ended."""
    if bf16_ends:
        distances = [100 * (ends[seed] / end - 1) for seed, end in bf16_ends.items() if seed in ends]
    else:
        distances = [] if bf16_end is None else [100 * (statistics.mean(ends.values()) / bf16_end - 1)]
    if distances:
        yield Row(name, "loss_against_bf16", statistics.mean(distances), "%")
    if len(distances) > 1:
        yield Row(name, "loss_against_bf16_error", statistics.stdev(distances) / len(distances) ** 0.5, "%")


def _known_end(output: Path) -> float | None:
    """Mean loss at the end in bf16, of an earlier call on this hardware."""
    path = output / f"fp8_curves_{short_hardware_name()}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return next((row["value"] for row in rows if (row["case"], row["metric"]) == ("bf16", "loss_last_20")), None)


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
