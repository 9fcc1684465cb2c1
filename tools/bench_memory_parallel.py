#!/usr/bin/env python3
"""Measures a recipe with its value tables replicated, sharded by rows and sharded by columns.

    python tools/bench_memory_parallel.py --config examples/configs/ultramemv2_227m_1b.yaml --ranks 2 \
        data.paths='[data/corpus]'

Every case is a run of its own on `--ranks` GPUs, all with one memory-parallel group. Rows of the results
(benchmarks/results/memory_parallel_<hardware>.json), means over one rank's micro-batches where not said otherwise:
  tokens_per_s                 forward and backward of 4 micro-batches on every rank, all ranks together
  tokens_per_s_with_optimizer  whole steps of as many
  tokens_per_s_spread_percent, step_ms_spread_percent  the slowest of the measured times less the fastest, in % of their
                               median, of which the speed is
  step_cost_percent            step time over that of `replicated` with the same kind of CUDA graphs, less 100 %
  exchange_mb                  received in forward and backward, by the run-time counter
  exchange_ms, exchange_gb_s   time of the all-to-all kernels, each on the rank that came to it last (the others wait
                               in theirs), and the rate
  exchange_hidden_percent      of that time in which another kernel ran
  gpu_busy_ms, peak_gib        of rank 0
The case `all_to_all` is the bare collective. `too_large_for_one` has tables whose weights, gradients and optimizer
state one GPU could not hold (`table_gib_on_one`, against `gpu_gib`), where two can (`table_gib` each). With `--traces`
rank 0's kernels of a micro-batch are kept in that folder, and a few milliseconds of them drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import UserError
from megatron_ultramem.quiet import quiet_dependencies
from megatron_ultramem.results import Row, write_results

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
MICRO_BATCHES = 4  # of a rank, per measured step
WARM_UP_STEPS, MEASURED_STEPS = 3, 5
BYTES_OF_A_PARAMETER = 2 + 4 + 12  # bf16, its fp32 gradient, fp32 weight and two moments
BESIDE_FFN = "parallel.overlap_exchange=true"
GRAPHS, FULL_GRAPHS = "train.cuda_graphs=memory", "train.cuda_graphs=full"
ALL_FIT = "parallel.exchange_capacity=1e9"  # room for everything, whatever the number of ranks
CASES = {
    "replicated": ["replicated"],
    "rows": ["rows"],
    "rows_overlap": ["rows", BESIDE_FFN],
    "rows_static_overlap": ["rows", BESIDE_FFN, "parallel.exchange_capacity=1.25"],
    "columns": ["columns"],
    "columns_overlap": ["columns", BESIDE_FFN],
    "rows_graphs": ["rows", GRAPHS, ALL_FIT],
    "replicated_graphs": ["replicated", GRAPHS],
    "columns_graphs": ["columns", GRAPHS],
    "columns_overlap_graphs": ["columns", BESIDE_FFN, GRAPHS],
    "replicated_full_graphs": ["replicated", FULL_GRAPHS],
    "columns_full_graphs": ["columns", FULL_GRAPHS],
    "columns_overlap_full_graphs": ["columns", BESIDE_FFN, FULL_GRAPHS],
    "rows_overlap_full_graphs": ["rows", BESIDE_FFN, FULL_GRAPHS, ALL_FIT],
    "too_large_for_one": ["columns", BESIDE_FFN, "model.memory.num_keys=1130"],
}


def main() -> int:
    args = _arguments()
    quiet_dependencies()
    if args.child is not None:
        return _child(args)
    rows: list[Row] = []
    try:
        load_config(args.config, args.overrides)
        for case in args.cases.split(","):
            rows += _in_processes(args, case)
            rows += _cost(rows, case)
            _show([row for row in rows if row.case == case])
            written = write_results(args.output, "memory_parallel", rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(written)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2, help="GPUs of this machine to use (default 2)")
    parser.add_argument("--cases", default=",".join(["all_to_all", *CASES]), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument("--traces", type=Path, help="folder for kernel traces and their pictures")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # a case, on one of the ranks
    parser.add_argument("overrides", nargs="*", metavar="section.setting=value")
    return parser.parse_args()


def _in_processes(args: argparse.Namespace, case: str) -> list[Row]:
    """The rows of a case, measured by ranks of their own."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}",
                   __file__, f"--config={args.config}", f"--child={case}", f"--output={found}"]  # fmt: skip
        if args.traces:
            command.append(f"--traces={args.traces}")
        done = subprocess.run([*command, *args.overrides], env=os.environ | {"OMP_NUM_THREADS": "4"})
        if done.returncode != 0:
            raise UserError(f"case {case} ended with exit code {done.returncode}; its ranks have said why")
        return [Row(**row) for row in json.loads(found.read_text())]


def _child(args: argparse.Namespace) -> int:
    try:
        rows = bare_exchange() if args.child == "all_to_all" else measure(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if rows:
        args.output.write_text(json.dumps([row.__dict__ for row in rows]))
    return 0


def bare_exchange() -> list[Row]:
    """The rate of all-to-alls of some sizes: what leaves a rank for the others and for itself, as is usual."""
    import torch
    import torch.distributed as dist

    from megatron_ultramem.platform import prepare

    platform = prepare("cuda")
    dist.init_process_group(platform.backend)
    rows = []
    for mebibytes in (1, 16, 256):
        sent = torch.zeros(mebibytes << 20, dtype=torch.uint8, device=platform.device)
        came = torch.empty_like(sent)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for repeat in range(25):
            if repeat == 5:
                begin.record()
            dist.all_to_all_single(came, sent)
        end.record()
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3 / 20
        moved = sent.nbytes * (dist.get_world_size() - 1) / dist.get_world_size()
        rows.append(Row("all_to_all", f"received_gb_s_{mebibytes}_mib", moved / seconds / 1e9, "GB/s per rank"))
        rows.append(Row("all_to_all", f"buffer_gb_s_{mebibytes}_mib", sent.nbytes / seconds / 1e9, "GB/s per rank"))
    main = dist.get_rank() == 0
    dist.destroy_process_group()
    return rows if main else []


def measure(args: argparse.Namespace) -> list[Row]:
    """One case on this rank; rows on the first."""
    placement, *settings = CASES[args.child]
    ranks = int(os.environ["WORLD_SIZE"])
    micro = load_config(args.config, args.overrides).train.micro_batch_size
    config = load_config(args.config, [
        *args.overrides, *settings, f"parallel.memory_placement={placement}",
        f"parallel.memory_parallel_size={1 if placement == 'replicated' else ranks}",
        f"train.global_batch_size={micro * ranks * MICRO_BATCHES}", f"train.steps={WARM_UP_STEPS + MEASURED_STEPS}",
        "schedule.warmup_steps=1", "train.eval_steps=0", "checkpoint.load=none",
    ])  # fmt: skip

    import torch

    from megatron_ultramem.model.build import value_pools
    from megatron_ultramem.platform import prepare
    from megatron_ultramem.training.distributed import destroy_distributed
    from megatron_ultramem.training.exchange_figures import exchange_rows
    from megatron_ultramem.training.loop import train_step
    from megatron_ultramem.training.measure import covered_ms, forward_backward_only, speed_rows, timing, trace
    from megatron_ultramem.training.setup import set_up

    prepare("cuda")
    run = set_up(config)
    for _ in range(WARM_UP_STEPS):
        loss = train_step(run)["loss"]
    step = timing(run, lambda: train_step(run), MEASURED_STEPS)
    forward_backward = timing(run, lambda: forward_backward_only(run, MICRO_BATCHES), MEASURED_STEPS)
    peak = torch.cuda.max_memory_allocated() / 2**30

    traffic = getattr(value_pools(run.model)[0].placement, "traffic", None)
    if traffic is not None:
        traffic.reset()
    spans = trace(run, lambda: forward_backward_only(run, 1))
    tokens = config.train.global_batch_size * config.data.sequence_length
    rows = [
        *speed_rows(args.child, tokens, step=step, forward_backward=forward_backward),
        Row(args.child, "gpu_busy_ms", covered_ms(spans), "ms per micro-batch"),
        Row(args.child, "peak_gib", peak, "GiB"),
        Row(args.child, "loss_last_step", loss, "nats/token"),
    ]
    tables = sum(table.numel() for pool in value_pools(run.model) for table in pool.parameters())
    if args.child == "too_large_for_one":
        held = tables * BYTES_OF_A_PARAMETER / 2**30
        rows += [
            Row(args.child, "table_gib", held, "GiB per rank"),
            Row(args.child, "table_gib_on_one", held * ranks, "GiB"),
            Row(args.child, "gpu_gib", torch.cuda.get_device_properties(0).total_memory / 2**30, "GiB"),
        ]
    if traffic is not None:
        rows += exchange_rows(args.child, spans, traffic)
    if args.traces and run.is_main:
        keep_trace(args.traces, args.child, spans)
    main = run.is_main
    destroy_distributed()
    return rows if main else []


def keep_trace(folder: Path, case: str, spans: list) -> None:
    """Writes the kernels, and a picture of the second memory layer's neighbourhood. Kernels that run at the same time
    lie in different lanes (in a graph of the whole model their streams have no meaning)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{case}.json").write_text(json.dumps([[s.name[:100], s.stream, s.begin, s.end] for s in spans]))
    lookups = [span.begin for span in spans if _color(span.name) == COLORS["memory layer"]]
    start = lookups[len(lookups) // 4] if lookups else spans[len(spans) // 4].begin
    shown = [span for span in spans if start - 500 < span.begin < start + 3500]
    lanes: list[float] = []  # the end of the last kernel of each
    figure, axes = plt.subplots(figsize=(12, 2.6), layout="constrained")
    for span in sorted(shown, key=lambda span: span.begin):
        lane = next((number for number, end in enumerate(lanes) if end <= span.begin), len(lanes))
        lanes[lane:] = [span.end, *lanes[lane + 1 :]]
        axes.barh(lane, span.end - span.begin, left=span.begin - start, height=0.8, color=_color(span.name))
    axes.set_yticks(range(len(lanes)), [f"{lane + 1}" for lane in range(len(lanes))])
    axes.set_ylabel("at the same time")
    axes.set_xlabel("microseconds")
    axes.set_title(f"{case}: kernels of one rank")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color, label=name) for name, color in COLORS.items()]
    figure.legend(handles=handles, ncols=len(COLORS), loc="outside lower center", fontsize=8)
    figure.savefig(folder / f"{case}.png", dpi=110)


COLORS = {"exchange": "tab:red", "memory layer": "tab:green", "matrices, attention": "tab:blue", "other": "tab:gray"}


def _color(kernel: str) -> str:
    from megatron_ultramem.training.exchange_figures import is_exchange

    name = kernel.lower()
    if is_exchange(kernel):
        return COLORS["exchange"]
    if any(word in name for word in ("lookup", "by_token", "segment", "coarse", "exact", "top_k", "select")):
        return COLORS["memory layer"]
    if any(word in name for word in ("gemm", "nvjet", "cutlass", "attn", "fmha", "flash")):
        return COLORS["matrices, attention"]
    return COLORS["other"]


def _cost(rows: list[Row], case: str) -> list[Row]:
    suffix = next(suffix for suffix in ("_full_graphs", "_graphs", "") if case.endswith(suffix))
    base = f"replicated{suffix}"
    step = {row.case: row.value for row in rows if row.metric == "step_ms"}
    if case == base or base not in step or case not in step:
        return []
    return [Row(case, "step_cost_percent", 100 * (step[case] / step[base] - 1), f"% of {base}")]


def _show(rows: list[Row]) -> None:
    table = Table("case", "metric", "value", "unit")
    for row in rows:
        table.add_row(row.case, row.metric, f"{row.value:,.4g}" if row.value < 1000 else f"{row.value:,.0f}", row.unit)
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
