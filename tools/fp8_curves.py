#!/usr/bin/env python3
"""Trains one recipe in bf16, with FP8 matrix products and with FP8 tables on the same data, and compares the losses.

    python tools/fp8_curves.py --config examples/configs/ultramemv2_227m_1b.yaml --steps 300 data.paths='[data/corpus]'

Every variant is a process of its own and starts from the same weights; one that fails costs the others nothing. Steps
have `--micro-batches` micro-batches. Results go to benchmarks/results/fp8_curves_<hardware>.json after every variant:
the case is the variant, with loss and gradient norm of every tenth step, and how far the mean loss of the last twenty
steps is from that of bf16 (of this call, or of the file), in per cent.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300, help="steps of training (default 300)")
    parser.add_argument("--micro-batches", type=int, default=1, help="per step (default 1)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for a variant (default 600)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # in a process of its own: train this variant
    parser.add_argument("overrides", nargs="*", metavar="section.setting=value")
    args = parser.parse_args()
    names = args.variants.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        parser.error(f"--variants {unknown[0]}: legal: {', '.join(VARIANTS)}")
    if args.steps < LAST:
        parser.error(f"--steps {args.steps}: legal: at least {LAST}")
    if args.only:
        return _train(args)
    curves: dict[str, dict[str, list[float]]] = {}
    failed = []
    for name in names:
        try:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--only", name], stdout=subprocess.PIPE, text=True, timeout=args.limit
            )
            curves[name] = json.loads(done.stdout.splitlines()[-1])
        except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
            failed.append(f"{name}: {type(error).__name__}")
            continue
        rows = rows_of(curves, _known_end(args.output))
        write_results(args.output, "fp8_curves", rows)
        for row in rows:
            if row.case == name and not row.metric.startswith(("loss_step", "grad_norm_step")):
                print(f"{row.case:24s} {row.metric:24s} {row.value:10.4f} {row.unit}", flush=True)
    for failure in failed:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failed else 0


def rows_of(curves: dict[str, dict[str, list[float]]], bf16_end: float | None) -> list[Row]:
    """What is kept of losses and gradient norms, by variant. bf16_end: its mean loss at the end, if not in `curves`."""
    ends = {name: statistics.mean(curve["losses"][-LAST:]) for name, curve in curves.items()}
    bf16_end = ends.get("bf16", bf16_end)
    rows = []
    for name, curve in curves.items():
        steps = len(curve["losses"])
        for step in sorted({1, steps, *range(EVERY, steps, EVERY)}):
            rows.append(Row(name, f"loss_step_{step}", curve["losses"][step - 1], "nats/token"))
            rows.append(Row(name, f"grad_norm_step_{step}", curve["grad_norms"][step - 1], ""))
        rows.append(Row(name, "loss_last_20", ends[name], "nats/token"))
        rows.append(Row(name, "grad_norm_median", statistics.median(curve["grad_norms"]), ""))
        rows.append(Row(name, "not_finite", sum(not math.isfinite(loss) for loss in curve["losses"]), "steps"))
        if bf16_end is not None:
            rows.append(Row(name, "loss_against_bf16", 100 * (ends[name] / bf16_end - 1), "%"))
    return rows


def _known_end(output: Path) -> float | None:
    """Mean loss at the end in bf16, of an earlier call on this hardware."""
    path = output / f"fp8_curves_{short_hardware_name()}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return next((row["value"] for row in rows if (row["case"], row["metric"]) == ("bf16", "loss_last_20")), None)


def _train(args: argparse.Namespace) -> int:
    """Prints the losses and gradient norms of one variant as a line of JSON."""
    quiet_dependencies()
    micro = load_config(args.config, check=False).train.micro_batch_size
    settings = [
        f"train.steps={args.steps}", f"train.global_batch_size={micro * args.micro_batches}", "train.eval_steps=0",
        f"schedule.warmup_steps={args.steps // 20}", "checkpoint.load=none",
        f"train.run_dir=runs/fp8_curves/{args.only}", *args.overrides, *VARIANTS[args.only],
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
