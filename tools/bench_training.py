#!/usr/bin/env python3
"""Trains a recipe for some steps and measures it: speed, memory, and whether the loss falls.

    python tools/bench_training.py --config examples/configs/ultramemv2_227m_1b.yaml data.paths='[data/corpus]'

`tokens_per_s` counts forward and backward alone, `tokens_per_s_with_optimizer` whole steps of 8 micro-batches;
`gpu_busy_ms` is the time that the GPU computes in one forward and backward, from the profiler. The case is the name of
the config file. Results go to benchmarks/results/training_<hardware>.json. Start it with torchrun for several ranks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import UserError
from megatron_ultramem.platform import prepare
from megatron_ultramem.quiet import quiet_dependencies
from megatron_ultramem.results import Row, write_results

if TYPE_CHECKING:
    from megatron_ultramem.training.setup import Run

MICRO_BATCHES = 8  # per measured optimizer step
MEASURED_STEPS = 5
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=50, help="steps of training (default 50)")
    parser.add_argument("--micro-batches", type=int, default=MICRO_BATCHES, help="per step of the training (default 8)")
    parser.add_argument("--warmup-steps", type=int, default=10, help="of the learning rate (default 10)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument("overrides", nargs="*", metavar="section.setting=value")
    args = parser.parse_args()
    quiet_dependencies()
    try:
        config = load_config(args.config, [*_benchmark_settings(args), *args.overrides])
        prepare(config.train.device)
        rows = measure(config, args.config.stem, args.steps)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if rows:
        table = Table("metric", "value", "unit", title=args.config.stem)
        for row in rows:
            table.add_row(row.metric, f"{row.value:,.4g}" if row.value < 1000 else f"{row.value:,.0f}", row.unit)
        Console().print(table)
        print(write_results(args.output, "training", rows))
    return 0


def _benchmark_settings(args: argparse.Namespace) -> list[str]:
    micro = load_config(args.config, check=False).train.micro_batch_size
    # Data for the measured steps too, which are larger.
    steps = args.steps + MEASURED_STEPS * -(-MICRO_BATCHES // args.micro_batches)
    return [
        f"train.steps={steps}", f"schedule.decay_steps={args.steps}", f"schedule.warmup_steps={args.warmup_steps}",
        f"train.global_batch_size={micro * args.micro_batches}", "train.eval_steps=0", "checkpoint.load=none",
    ]  # fmt: skip


def measure(config: Config, case: str, steps: int) -> list[Row]:
    """Rows of one recipe, trained for `steps` steps; empty on all ranks but the first."""
    from megatron_ultramem.training.distributed import destroy_distributed
    from megatron_ultramem.training.loop import train_step
    from megatron_ultramem.training.measure import covered_ms, forward_backward_only, median_seconds, trace
    from megatron_ultramem.training.setup import set_batch_size, set_up

    run = set_up(config)
    losses, norms = [], []
    for step in range(steps):
        metrics = train_step(run)
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
        if run.is_main and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)
    config.train.global_batch_size = config.train.micro_batch_size * MICRO_BATCHES
    set_batch_size(config, run.position.consumed_samples)
    tokens = config.train.global_batch_size * config.data.sequence_length
    step_seconds = median_seconds(run, lambda: train_step(run), MEASURED_STEPS)
    peak = torch.cuda.max_memory_allocated() / 2**30 if run.platform.is_cuda else 0.0
    forward_backward_seconds = median_seconds(
        run, lambda: forward_backward_only(run, MICRO_BATCHES // _data_parallel_size()), MEASURED_STEPS
    )
    flops = _flops_per_token(run)
    ranks = torch.distributed.get_world_size()
    rows = [
        Row(case, "tokens_per_s", tokens / forward_backward_seconds, "tokens/s"),
        Row(case, "tokens_per_s_with_optimizer", tokens / step_seconds, "tokens/s"),
        Row(case, "tflops", tokens / forward_backward_seconds * flops / ranks / 1e12, "TFLOP/s per GPU"),
        Row(case, "peak_gib", peak, "GiB"),
        Row(case, "step_ms", step_seconds * 1e3, "ms"),
        *(Row(case, f"loss_step_{step}", losses[step - 1], "nats/token")
          for step in sorted({1, steps, *range(10, steps, 10)})),
        Row(case, "grad_norm_last", norms[-1], ""),
    ]  # fmt: skip
    if run.platform.is_cuda:
        busy = covered_ms(trace(run, lambda: forward_backward_only(run, 1)))
        rows.append(Row(case, "gpu_busy_ms", busy, "ms per micro-batch"))
    is_main = run.is_main
    destroy_distributed()
    return rows if is_main else []


def _flops_per_token(run: Run) -> float:
    from megatron_ultramem.planning.flops import flops_per_token

    config = run.config
    return flops_per_token(config.model, run.checkpoints.vocab_size, config.data.sequence_length).training


def _data_parallel_size() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_data_parallel_world_size())


if __name__ == "__main__":
    raise SystemExit(main())
