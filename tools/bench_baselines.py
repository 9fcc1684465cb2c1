#!/usr/bin/env python3
"""The models of one family side by side: speed, memory and what binds them, each as fast as its settings make it.

    python tools/bench_baselines.py --mcore path/of/another/megatron-core

Every recipe is tried in several ways, all measured alike on the standard library's sources: micro-batches of 4 x 4096
tokens, forward and backward alone (`tokens_per_s`, `tflops`) and in steps of 8 with the optimizer
(`tokens_per_s_with_optimizer`; not of a way that is slower than one before it). `gpu_busy_ms` is what the GPU computes
in one of them, from the profiler, and `gpu_busy_percent` its share of the micro-batch's wall time: what is well below
100 is bound by the host's launches. A recipe's case is its fastest way; each way is a case of its own, `recipe/way`.

Ways of one environment run one after the other in a process of their own, until one fails or does not give its memory
back: the others go on in a fresh one. What cannot run is said and left out. Results go to
benchmarks/results/training_<hardware>.json after every case. On one H100 about a quarter of a minute each, of the MoE
half a minute; another quarter for every process.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config, TokenizerConfig
from megatron_ultramem.errors import UserError, exit_status
from megatron_ultramem.platform import prepare
from megatron_ultramem.quiet import quiet_dependencies
from megatron_ultramem.results import Row, results_path, write_results

if TYPE_CHECKING:
    from megatron_ultramem.training.setup import Run

ROOT = Path(__file__).resolve().parents[1]
MICRO_BATCHES = 8  # per measured optimizer step
MEASURED = 3  # steps, of which the median counts
WARM_UP_STEPS, WARM_UP_MICRO_BATCHES = 3, 2  # kernels are compiled, graphs recorded
FILES = 200  # of the standard library: more text than the steps need
WORTH_A_STEP = 0.97  # of the fastest way so far, in tokens/s
LEFT_BYTES = 1 << 29  # of GPU memory that a case may leave behind: workspaces of libraries, no model
NOT_CLEAN = 3  # exit status of a process that has more
POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Way:
    """Of running a recipe: settings, variables of the environment, and whether on the Megatron-Core of --mcore."""

    settings: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    other_mcore: bool = False

    def shares_process_with(self, other: Way) -> bool:
        return (self.environment, self.other_mcore) == (other.environment, other.other_mcore)


Case = tuple[str, str]  # recipe, way
Found = dict[str, dict[str, list[Row]]]  # rows by recipe and way

PRESET, ROUTER, ALLGATHER = "preset=throughput", "model.moe.router_fusion=true", "model.moe.dispatcher=allgather"
CUTLASS = (("NVTE_USE_CUTLASS_GROUPED_GEMM", "1"),)  # one launch for all experts, where cuBLAS has one for each
# Of attention and routers; Megatron's do not go with weight gradients that are fused into their GEMMs.
GRAPHS = ("train.cuda_graphs=layers", "train.fused_weight_gradients=false")
PRESET_AND_PLAIN = {"preset": Way((PRESET,)), "plain": Way()}
MOE = "olmoe_227m_1b"
# The most promising way of each recipe comes first; ways of one environment stand together.
WAYS: dict[str, dict[str, Way]] = {
    "ultramemv2_227m_1b": {**PRESET_AND_PLAIN, "memory_graphs": Way((PRESET, "train.cuda_graphs=memory"))},
    MOE: {
        "preset": Way((PRESET, ROUTER)),
        "preset_cutlass": Way((PRESET, ROUTER), CUTLASS),
        "graphs_cutlass": Way((PRESET, ROUTER, *GRAPHS), CUTLASS),
        "preset_allgather_cutlass": Way((PRESET, ROUTER, ALLGATHER), CUTLASS),
        "mcore_preset_cutlass": Way((PRESET, ROUTER), CUTLASS, other_mcore=True),
        "mcore_graphs_cutlass": Way((PRESET, ROUTER, *GRAPHS), CUTLASS, other_mcore=True),
        "mcore_preset": Way((PRESET, ROUTER), other_mcore=True),
        "mcore_preset_allgather": Way((PRESET, ROUTER, ALLGATHER), other_mcore=True),
        "graphs": Way((PRESET, ROUTER, *GRAPHS)),
        "preset_allgather": Way((PRESET, ROUTER, ALLGATHER)),
        "preset_no_router_fusion": Way((PRESET,)),
        "preset_no_permute_fusion": Way((PRESET, ROUTER, "model.moe.permute_fusion=false")),
        "plain": Way(),
    },
    "dense_227m": PRESET_AND_PLAIN,
    "memory_plus_227m_1b": PRESET_AND_PLAIN,
    "ultramem_227m_1b": PRESET_AND_PLAIN,
}


def main(arguments: list[str] | None = None) -> int:
    args = _arguments(arguments)
    quiet_dependencies()
    return exit_status(lambda: _measure_all(args) if args.child is None else _child(args.child))


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="*", help="recipe/way, with wildcards and commas between (default: all)")
    parser.add_argument("--mcore", type=Path, help="folder of another Megatron-Core, for the ways that are of it")
    parser.add_argument("--seconds", type=float, default=120, help="a way that takes longer is given up (default 120)")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no more is measured")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="ways that the file of results has, and that are not measured now, count too",
    )
    parser.add_argument("--recipes", type=Path, default=ROOT / "examples" / "configs", help="folder of the recipes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="section.setting=value", help="for all recipes")
    return parser.parse_args(arguments)


def _cases(patterns: str, mcore: Path | None) -> list[Case]:
    """First the first way of each recipe, then the MoE's others, so that what is cut off is what matters least."""
    every = [(recipe, way) for recipe, ways in WAYS.items() for way in ways]
    chosen = [
        (recipe, way)
        for recipe, way in every
        if any(fnmatch.fnmatch(f"{recipe}/{way}", pattern) for pattern in patterns.split(","))
        and (mcore is not None or not WAYS[recipe][way].other_mcore)
    ]
    if not chosen:
        raise UserError(f"--cases {patterns}: legal: {', '.join('/'.join(case) for case in every)}")

    def rank(case: Case) -> int:
        recipe, way = case
        return 0 if way == next(iter(WAYS[recipe])) else 1 if recipe == MOE and way != "plain" else 2

    return sorted(chosen, key=rank)


def _measure_all(args: argparse.Namespace) -> None:
    deadline = time.monotonic() + args.limit
    waiting = _cases(args.cases, args.mcore)
    if args.mcore is not None and not (args.mcore / "megatron" / "core").is_dir():
        raise UserError(f"--mcore {args.mcore}: legal: a folder that holds megatron/core")
    found: Found = {recipe: {} for recipe, _ in waiting}
    if args.keep:
        _find_again(args.output, found, waiting)
    with tempfile.TemporaryDirectory() as folder:
        settings: list[str] = []
        while waiting and time.monotonic() < deadline:
            settings = settings or [*_text(Path(folder) / "text"), *args.settings]
            waiting.sort(key=lambda case: bool(found[case[0]]))  # a recipe whose best way failed has another at once
            ways = [WAYS[recipe][way] for recipe, way in waiting]
            alike = next((n for n, way in enumerate(ways) if not way.shares_process_with(ways[0])), len(ways))
            waiting = waiting[_run(args, waiting[:alike], settings, Path(folder), found, deadline) :]
    if waiting:
        print(f"not measured, as the time is over: {', '.join('/'.join(case) for case in waiting)}")
    if not any(found.values()):
        raise UserError("no case ran; their output says why")
    _show(results(found))


def _find_again(folder: Path, found: Found, waiting: Sequence[Case]) -> None:
    """Adds the ways of the same recipes that were measured before."""
    path = results_path(folder, "training")
    for row in json.loads(path.read_text())["rows"] if path.exists() else []:
        recipe, _, way = row["case"].partition("/")
        if recipe in found and way in WAYS[recipe] and (recipe, way) not in waiting:
            found[recipe].setdefault(way, []).append(Row(recipe, row["metric"], row["value"], row["unit"]))


def _text(prefix: Path) -> list[str]:
    """Some sources of the standard library, tokenised, as settings."""
    from megatron_ultramem.training.preprocess import preprocess
    from megatron_ultramem.training.stdlib_corpus import stdlib_files

    preprocess(stdlib_files()[:FILES], prefix, TokenizerConfig())
    return [f"data.train_paths=[{prefix}]", f"data.cache_dir={prefix.parent}/cache"]


def _run(
    args: argparse.Namespace, cases: Sequence[Case], settings: list[str], folder: Path, found: Found, deadline: float
) -> int:
    """Measures cases of one environment in a process, until one of them fails; how many are over. Their rows go into
    `found` and to the results as they come."""
    way = WAYS[cases[0][0]][cases[0][1]]
    environment = os.environ | dict(way.environment)
    if way.other_mcore:
        environment["PYTHONPATH"] = os.pathsep.join([str(args.mcore.resolve()), environment.get("PYTHONPATH", "")])
    plan: list[dict[str, Any]] = [{
        "recipe": str(args.recipes / f"{recipe}.yaml"), "beat": _fastest(found[recipe]),
        "settings": [*settings, *WAYS[recipe][way].settings, f"train.run_dir={folder}/{recipe}_{way}"],
        "output": str(folder / f"{recipe}_{way}.json"),
    } for recipe, way in cases]  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, __file__, f"--child={folder / 'plan.json'}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        for number, (recipe, way_name) in enumerate(cases):
            output = Path(plan[number]["output"])
            status = _await(output, process, min(args.seconds, deadline - time.monotonic()))
            if output.exists():
                found[recipe][way_name] = rows = [Row(**row) for row in json.loads(output.read_text())]
                print(f"{recipe}/{way_name}: {value(rows, 'tokens_per_s'):,.0f} tokens/s", flush=True)
                write_results(args.output, "training", results(found))
            elif status == NOT_CLEAN:
                return number
            else:
                why = (folder / "log").read_text(errors="replace").splitlines()[-12:]
                print(f"{recipe}/{way_name} did not run:", *(["it took too long"] if status is None else why), sep="\n")
                return number + 1
        return len(cases)
    finally:
        process.kill()
        process.wait()


def _await(output: Path, process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Until the output is there, the process has ended, or the time is over; the status of an ended process."""
    until = time.monotonic() + seconds
    while not output.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    return process.poll()


def _child(plan: Path) -> int:
    """The cases of a plan, one after the other."""
    fastest: dict[str, float] = {}
    for number, case in enumerate(json.loads(plan.read_text())):
        if number and torch.cuda.is_available() and torch.cuda.memory_allocated() > LEFT_BYTES:
            return NOT_CLEAN  # it would count in the peak of the next one
        recipe, output = Path(case["recipe"]), Path(case["output"])
        micro = load_config(recipe, case["settings"], check=False).train.micro_batch_size
        config = load_config(recipe, [
            "train.steps=1000", "schedule.warmup_steps=10", "train.eval_steps=0", "checkpoint.load=none",
            "train.rampup_batch_size=[]", f"train.global_batch_size={micro * WARM_UP_MICRO_BATCHES}",
            *case["settings"],
        ])  # fmt: skip
        prepare(config.train.device)
        rows = measure(config, recipe.stem, max(case["beat"], fastest.get(recipe.stem, 0.0)))
        fastest[recipe.stem] = max(value(rows, "tokens_per_s"), fastest.get(recipe.stem, 0.0))
        part = output.with_suffix(".part")
        part.write_text(json.dumps([dataclasses.asdict(row) for row in rows]))
        part.rename(output)
    return 0


def measure(config: Config, case: str, beat: float = 0.0) -> list[Row]:
    """One case in this process. beat: tokens/s; a case that does not come near is not measured with the optimizer."""
    from megatron_ultramem.compat import MCORE_VERSION
    from megatron_ultramem.planning.flops import flops_per_token
    from megatron_ultramem.training.benchmark import let_go
    from megatron_ultramem.training.loop import train_step
    from megatron_ultramem.training.measure import forward_backward_only, median_seconds
    from megatron_ultramem.training.setup import set_batch_size, set_up

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run = set_up(config)
    try:
        for _ in range(WARM_UP_STEPS):
            train_step(run)
        config.train.global_batch_size = config.train.micro_batch_size * MICRO_BATCHES
        set_batch_size(config, run.position.consumed_samples)
        tokens = config.train.micro_batch_size * config.data.sequence_length  # of a micro-batch
        count = MICRO_BATCHES // 2
        both = median_seconds(run, lambda: forward_backward_only(run, count), MEASURED) / count
        flops = flops_per_token(config.model, run.checkpoints.vocab_size, config.data.sequence_length).training
        rows = [
            Row(case, "tokens_per_s", tokens / both, "tokens/s"),
            Row(case, "tflops", tokens / both * flops / 1e12, "TFLOP/s per GPU"),
            Row(case, "micro_batch_ms", both * 1e3, "ms"),
            Row(case, "megatron_core", float(".".join(map(str, MCORE_VERSION))), "version"),
        ]
        if tokens / both > WORTH_A_STEP * beat:
            step = median_seconds(run, lambda: train_step(run), MEASURED)
            rows += [
                Row(case, "tokens_per_s_with_optimizer", tokens * MICRO_BATCHES / step, "tokens/s"),
                Row(case, "step_ms", step * 1e3, "ms"),
            ]
        return rows + _on_gpu(run, case, both)
    finally:
        let_go(run)


def _on_gpu(run: Run, case: str, seconds: float) -> list[Row]:
    """Memory, and what the GPU does in a micro-batch that takes so many seconds."""
    from megatron_ultramem.training.measure import covered_ms, forward_backward_only, trace

    if not run.platform.is_cuda:
        return []
    peak = torch.cuda.max_memory_allocated() / 2**30
    spans = trace(run, lambda: forward_backward_only(run, 1))
    busy = covered_ms(spans)
    return [
        Row(case, "peak_gib", peak, "GiB"),
        Row(case, "gpu_busy_ms", busy, "ms per micro-batch"),
        Row(case, "gpu_busy_percent", busy / seconds / 10, "% of the micro-batch's wall time"),
        Row(case, "kernels", len(spans), "per micro-batch"),
    ]


def results(found: Found) -> list[Row]:
    """The fastest way of each recipe under the recipe's name, and every way under its own."""
    rows: list[Row] = []
    for recipe, ways in found.items():
        if ways:
            rows += max(ways.values(), key=lambda own: value(own, "tokens_per_s"))
        rows += [dataclasses.replace(row, case=f"{recipe}/{way}") for way, own in ways.items() for row in own]
    return rows


def value(rows: Iterable[Row], metric: str) -> float:
    return next(row.value for row in rows if row.metric == metric)


def _fastest(ways: dict[str, list[Row]]) -> float:
    return max((value(rows, "tokens_per_s") for rows in ways.values()), default=0.0)


def _show(rows: list[Row]) -> None:
    metrics = ("tokens_per_s", "tokens_per_s_with_optimizer", "tflops", "peak_gib", "gpu_busy_ms", "gpu_busy_percent")
    table = Table("case", *metrics)
    for case in dict.fromkeys(row.case for row in rows):
        own = {row.metric: row.value for row in rows if row.case == case}
        table.add_row(case, *(f"{own[metric]:,.4g}" if metric in own else "-" for metric in metrics))
    Console(width=140).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
