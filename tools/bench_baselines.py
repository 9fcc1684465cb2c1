#!/usr/bin/env python3
"""The models of one family side by side: speed, memory and what binds them, each as fast as its settings make it.

    python tools/bench_baselines.py --mcore path/of/another/megatron-core

Every recipe is tried in several ways, each in a process of its own, all measured alike on the standard library's
sources: micro-batches of 4 x 4096 tokens, forward and backward alone (`tokens_per_s`, `tflops`) and in steps of 8 with
the optimizer (`tokens_per_s_with_optimizer`); `gpu_busy_ms` is what the GPU computes in one of them, from the profiler,
and `gpu_busy_percent` its share of the micro-batch's wall time: what is well below 100 is bound by the host's launches.
A recipe's case is its fastest way; each way is a case of its own, `recipe/way`. What cannot run is said and left out.

Results go to benchmarks/results/training_<hardware>.json after every case. About half a minute each on one H100.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config, TokenizerConfig
from megatron_ultramem.errors import UserError, exit_status
from megatron_ultramem.platform import prepare
from megatron_ultramem.quiet import quiet_dependencies
from megatron_ultramem.results import Row, write_results

ROOT = Path(__file__).resolve().parents[1]
MICRO_BATCHES = 8  # per measured optimizer step
MEASURED = 3  # steps, of which the median counts
WARM_UP_STEPS, WARM_UP_MICRO_BATCHES = 3, 2  # kernels are compiled, graphs recorded
FILES = 200  # of the standard library: more text than the steps need
OTHER_MCORE = "mcore"  # ways whose names begin so run on the Megatron-Core of --mcore


@dataclasses.dataclass(frozen=True)
class Way:
    """Of running a recipe: settings, and variables of the environment."""

    settings: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


PRESET, ROUTER, ALLGATHER = "preset=throughput", "model.moe.router_fusion=true", "model.moe.dispatcher=allgather"
CUTLASS = (("NVTE_USE_CUTLASS_GROUPED_GEMM", "1"),)  # one launch for all experts, where cuBLAS has one for each
# Of attention and routers; Megatron's do not go with weight gradients that are fused into their GEMMs.
GRAPHS = ("train.cuda_graphs=layers", "train.fused_weight_gradients=false")
PRESET_AND_PLAIN = {"throughput": Way((PRESET,)), "plain": Way()}
# The most promising way of each recipe comes first.
WAYS: dict[str, dict[str, Way]] = {
    "ultramemv2_227m_1b": {**PRESET_AND_PLAIN, "memory_graphs": Way(("train.cuda_graphs=memory",))},
    "olmoe_227m_1b": {
        "throughput": Way((PRESET, ROUTER)),
        "throughput_cutlass": Way((PRESET, ROUTER), CUTLASS),
        "graphs_cutlass": Way((PRESET, ROUTER, *GRAPHS), CUTLASS),
        "throughput_allgather_cutlass": Way((PRESET, ROUTER, ALLGATHER), CUTLASS),
        "mcore_throughput_cutlass": Way((PRESET, ROUTER), CUTLASS),
        "mcore_graphs_cutlass": Way((PRESET, ROUTER, *GRAPHS), CUTLASS),
        "mcore_throughput_allgather": Way((PRESET, ROUTER, ALLGATHER)),
        "plain": Way(),
        "router_fusion": Way((ROUTER,)),
        "allgather": Way((ROUTER, ALLGATHER)),
        "mcore_router_fusion": Way((ROUTER,)),
        "no_permute_fusion": Way(("model.moe.permute_fusion=false",)),
    },
    "dense_227m": PRESET_AND_PLAIN,
    "memory_plus_227m_1b": PRESET_AND_PLAIN,
    "ultramem_227m_1b": PRESET_AND_PLAIN,
}


def main(arguments: list[str] | None = None) -> int:
    args = _arguments(arguments)
    quiet_dependencies()
    return exit_status(lambda: _measure_all(args) if args.child is None else _child(args))


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="*", help="recipe/way, with wildcards and commas between (default: all)")
    parser.add_argument(
        "--mcore", type=Path, help="folder of another Megatron-Core, for the ways that begin with mcore"
    )
    parser.add_argument("--seconds", type=float, default=90, help="a way that takes longer is given up (default 90)")
    parser.add_argument("--recipes", type=Path, default=ROOT / "examples" / "configs", help="folder of the recipes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="section.setting=value", help="for all recipes")
    return parser.parse_args(arguments)


def _cases(patterns: str, mcore: Path | None) -> list[tuple[str, str]]:
    """First the first way of each recipe, then the second, …, so that what is cut off is what matters least."""
    every = [(recipe, way) for recipe, ways in WAYS.items() for way in ways]
    chosen = [
        (recipe, way)
        for recipe, way in every
        if any(fnmatch.fnmatch(f"{recipe}/{way}", pattern) for pattern in patterns.split(","))
        and (mcore is not None or not way.startswith(OTHER_MCORE))
    ]
    if not chosen:
        raise UserError(f"--cases {patterns}: legal: {', '.join('/'.join(case) for case in every)}")
    return sorted(chosen, key=lambda case: list(WAYS[case[0]]).index(case[1]))


def _measure_all(args: argparse.Namespace) -> None:
    cases = _cases(args.cases, args.mcore)
    if args.mcore is not None and not (args.mcore / "megatron" / "core").is_dir():
        raise UserError(f"--mcore {args.mcore}: legal: a folder that holds megatron/core")
    found: dict[str, dict[str, list[Row]]] = {recipe: {} for recipe, _ in cases}
    with tempfile.TemporaryDirectory() as folder:
        settings = [*_text(Path(folder) / "text"), *args.settings]
        for recipe, way in cases:
            rows = _run(args, recipe, way, settings, Path(folder))
            if rows:
                found[recipe][way] = rows
                print(f"{recipe}/{way}: {value(rows, 'tokens_per_s'):,.0f} tokens/s", flush=True)
                written = write_results(args.output, "training", results(found), keep_other_metrics=True)
    if not any(found.values()):
        raise UserError("no case ran; their output says why")
    _show(results(found))
    print(written)


def _text(prefix: Path) -> list[str]:
    """Some sources of the standard library, tokenised, as settings."""
    from megatron_ultramem.training.preprocess import preprocess
    from megatron_ultramem.training.stdlib_corpus import stdlib_files

    preprocess(stdlib_files()[:FILES], prefix, TokenizerConfig())
    return [f"data.train_paths=[{prefix}]", f"data.cache_dir={prefix.parent}/cache"]


def _run(args: argparse.Namespace, recipe: str, way: str, settings: list[str], folder: Path) -> list[Row]:
    """Rows of one case, from a process of its own; none if it failed, and then the end of its output is shown."""
    chosen, output = WAYS[recipe][way], folder / f"{recipe}_{way}.json"
    environment = os.environ | dict(chosen.environment)
    if way.startswith(OTHER_MCORE):
        environment["PYTHONPATH"] = os.pathsep.join([str(args.mcore), environment.get("PYTHONPATH", "")])
    command = [
        sys.executable, __file__, f"--child={recipe}", f"--recipes={args.recipes}", f"--output={output}",
        f"train.run_dir={folder}/{recipe}_{way}", *settings, *chosen.settings,
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, env=environment, timeout=args.seconds, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode == 0:
            return [Row(**row) for row in json.loads(output.read_text())]
        why = "\n".join(done.stdout.splitlines()[-12:])
    except subprocess.TimeoutExpired:
        why = f"took more than {args.seconds:g} s"
    print(f"{recipe}/{way} did not run:\n{why}", flush=True)
    return []


def _child(args: argparse.Namespace) -> int:
    recipe = args.recipes / f"{args.child}.yaml"
    micro = load_config(recipe, args.settings, check=False).train.micro_batch_size
    config = load_config(recipe, [
        "train.steps=1000", "schedule.warmup_steps=10", "train.eval_steps=0", "checkpoint.load=none",
        "train.rampup_batch_size=[]", f"train.global_batch_size={micro * WARM_UP_MICRO_BATCHES}", *args.settings,
    ])  # fmt: skip
    prepare(config.train.device)
    rows = measure(config, args.child)
    args.output.write_text(json.dumps([dataclasses.asdict(row) for row in rows]))
    return 0


def measure(config: Config, case: str) -> list[Row]:
    """One case in this process."""
    from megatron_ultramem.compat import MCORE_VERSION
    from megatron_ultramem.planning.flops import flops_per_token
    from megatron_ultramem.training.distributed import destroy_distributed
    from megatron_ultramem.training.loop import train_step
    from megatron_ultramem.training.measure import covered_ms, forward_backward_only, median_seconds, trace
    from megatron_ultramem.training.setup import set_batch_size, set_up

    run = set_up(config)
    for _ in range(WARM_UP_STEPS):
        train_step(run)
    config.train.global_batch_size = config.train.micro_batch_size * MICRO_BATCHES
    set_batch_size(config, run.position.consumed_samples)
    tokens = config.train.micro_batch_size * config.data.sequence_length  # of a micro-batch
    step = median_seconds(run, lambda: train_step(run), MEASURED)
    both = median_seconds(run, lambda: forward_backward_only(run, MICRO_BATCHES // 2), MEASURED) / (MICRO_BATCHES // 2)
    flops = flops_per_token(config.model, run.checkpoints.vocab_size, config.data.sequence_length).training
    rows = [
        Row(case, "tokens_per_s", tokens / both, "tokens/s"),
        Row(case, "tokens_per_s_with_optimizer", tokens * MICRO_BATCHES / step, "tokens/s"),
        Row(case, "tflops", tokens / both * flops / 1e12, "TFLOP/s per GPU"),
        Row(case, "micro_batch_ms", both * 1e3, "ms"),
        Row(case, "step_ms", step * 1e3, "ms"),
        Row(case, "megatron_core", float(".".join(map(str, MCORE_VERSION))), "version"),
    ]
    if run.platform.is_cuda:
        spans = trace(run, lambda: forward_backward_only(run, 1))
        busy = covered_ms(spans)
        rows += [
            Row(case, "peak_gib", torch.cuda.max_memory_allocated() / 2**30, "GiB"),
            Row(case, "gpu_busy_ms", busy, "ms per micro-batch"),
            Row(case, "gpu_busy_percent", busy / both / 10, "% of the micro-batch's wall time"),
            Row(case, "kernels", len(spans), "per micro-batch"),
        ]
    destroy_distributed()
    return rows


def results(found: dict[str, dict[str, list[Row]]]) -> list[Row]:
    """The fastest way of each recipe under the recipe's name, and every way under its own."""
    rows: list[Row] = []
    for recipe, ways in found.items():
        if ways:
            rows += max(ways.values(), key=lambda own: value(own, "tokens_per_s"))
        rows += [dataclasses.replace(row, case=f"{recipe}/{way}") for way, own in ways.items() for row in own]
    return rows


def value(rows: Iterable[Row], metric: str) -> float:
    return next(row.value for row in rows if row.metric == metric)


def _show(rows: list[Row]) -> None:
    metrics = ("tokens_per_s", "tokens_per_s_with_optimizer", "tflops", "peak_gib", "gpu_busy_ms", "gpu_busy_percent")
    table = Table("case", *metrics)
    for case in dict.fromkeys(row.case for row in rows):
        own = {row.metric: row.value for row in rows if row.case == case}
        table.add_row(case, *(f"{own[metric]:,.4g}" if metric in own else "-" for metric in metrics))
    Console(width=140).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
