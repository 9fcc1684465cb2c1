"""Runs that were measured on GPUs (benchmarks/results), what they were started with, and how far off the planner is."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.planning.clusters import load_cluster
from megatron_ultramem.planning.evaluate import Evaluation
from megatron_ultramem.planning.memory import GIB
from megatron_ultramem.planning.scaling import CUTLASS, case_named, evaluate, predicted_again
from megatron_ultramem.results import Row

FAST, FAST_FP8 = "preset=throughput", "preset=throughput_fp8"
ROUTER, ALLGATHER = "model.moe.router_fusion=true", "model.moe.dispatcher=allgather"
OF_LAYERS = ("train.cuda_graphs=layers", "train.fused_weight_gradients=false")
OF_MEMORY, OF_ALL = "train.cuda_graphs=memory", "train.cuda_graphs=full"
BESIDE_FFN, ALL_FIT = "parallel.overlap_exchange=true", "parallel.exchange_capacity=1e9"
TWO = "parallel.memory_parallel_size=2"
COLUMNS, ROWS = (TWO, "parallel.memory_placement=columns"), (TWO, "parallel.memory_placement=rows")
FIGURES = ("peak", "step")
SMALL, CUT = "ultramemv2_227m_1b", "ultramemv2_1b_7b_cut"
PRESETS: dict[str, tuple[str, ...]] = {"throughput": (FAST,), "throughput_fp8": (FAST_FP8,)}

# What tools measure, by case: settings on top of the sizes. tools/check_plan.py, of SMALL:
CHECKED: dict[str, tuple[str, ...]] = {
    "as_is": (),
    "recompute_memory": ("model.memory.recompute=true",),
    "recompute_full_twice_the_micro_batch": ("train.recompute=full", "train.micro_batch_size=8"),
    "memory_graphs": (OF_MEMORY,),
    "throughput": (FAST,),
    "throughput_fp8": (FAST, "train.fp8.recipe=tensorwise"),
}
# tools/bench_baselines.py, of recipes in several ways:
WAYS: dict[str, dict[str, tuple[str, ...]]] = {
    SMALL: {"preset": (FAST,), "plain": (), "memory_graphs": (FAST, OF_MEMORY)},
    "olmoe_227m_1b": {
        **dict.fromkeys(("preset", "preset_cutlass", "mcore_preset", "mcore_preset_cutlass"), (FAST, ROUTER)),
        **dict.fromkeys(("graphs", "graphs_cutlass", "mcore_graphs_cutlass"), (FAST, ROUTER, *OF_LAYERS)),
        **dict.fromkeys(
            ("preset_allgather", "preset_allgather_cutlass", "mcore_preset_allgather"), (FAST, ROUTER, ALLGATHER)
        ),
        "preset_no_router_fusion": (FAST,),
        "preset_no_permute_fusion": (FAST, ROUTER, "model.moe.permute_fusion=false"),
        "plain": (),
    },
    **dict.fromkeys(("dense_227m", "memory_plus_227m_1b", "ultramem_227m_1b"), {"preset": (FAST,), "plain": ()}),
}
# tools/bench_memory_parallel.py, of SMALL on two GPUs:
SHARED: dict[str, tuple[str, ...]] = {
    "replicated": (),
    "rows": ROWS,
    "rows_overlap": (*ROWS, BESIDE_FFN),
    "rows_static_overlap": (*ROWS, BESIDE_FFN, "parallel.exchange_capacity=1.25"),
    "columns": COLUMNS,
    "columns_overlap": (*COLUMNS, BESIDE_FFN),
    "rows_graphs": (*ROWS, OF_MEMORY, ALL_FIT),
    "replicated_graphs": (OF_MEMORY,),
    "columns_graphs": (*COLUMNS, OF_MEMORY),
    "columns_overlap_graphs": (*COLUMNS, BESIDE_FFN, OF_MEMORY),
    "replicated_full_graphs": (OF_ALL,),
    "columns_full_graphs": (*COLUMNS, OF_ALL),
    "columns_overlap_full_graphs": (*COLUMNS, BESIDE_FFN, OF_ALL),
    "rows_overlap_full_graphs": (*ROWS, BESIDE_FFN, OF_ALL, ALL_FIT),
    "too_large_for_one": (*COLUMNS, BESIDE_FFN, "model.memory.num_keys=1130"),
}
# tools/bench_offload.py, of SMALL:
OFFLOADED: dict[str, tuple[str, ...]] = {
    "on_device": (),
    "torch": ("optimizer.value_offload=torch",),
    "deepspeed": ("optimizer.value_offload=deepspeed",),
    "too_large_deepspeed": ("optimizer.value_offload=deepspeed", "model.memory.num_keys=804"),
}


@dataclass(frozen=True)
class MeasuredRun:
    """A case of benchmarks/results: `settings` are of `config`, a file of this repository."""

    benchmark: str
    hardware: str  # as files are named: h100, h200x2
    case: str
    config: str
    settings: tuple[str, ...]
    step_ms: float
    peak_gib: float

    def plan(self, root: Path) -> Evaluation:
        """What the planner says of it."""
        name, _, gpus = self.hardware.partition("x")
        environment = [CUTLASS] if "cutlass" in self.case else []
        config = load_config(root / self.config, self.settings)
        return evaluate(config, int(gpus or 1), load_cluster(name), environment)


@dataclass(frozen=True)
class Errors:
    """Of a prediction, in % of the measured."""

    case: str
    moe: bool
    step: float
    peak: float


def measured_runs(root: Path) -> list[MeasuredRun]:
    """All that are in `root`/benchmarks/results and known here; those of tools/bench_scaling.py are to
    planning/scaling.py."""
    found = []
    for benchmark, hardware, case, config, settings in _known():
        figures = _figures(root, f"{benchmark}_{hardware}").get(case, {})
        step, peak = (figures.get(name, figures.get(f"{name}_measured")) for name in ("step_ms", "peak_gib"))
        if step is not None and peak is not None:
            found.append(MeasuredRun(benchmark, hardware, case, config, settings, step, peak))
    return found


def all_errors(root: Path) -> list[Errors]:
    """Of all runs that were measured, each once."""
    found = []
    for run in measured_runs(root):
        plan = run.plan(root)
        step, peak = plan.time.seconds * 1e3 / run.step_ms, plan.memory.peak / GIB / run.peak_gib
        found.append(Errors(run.case, _has_moe(plan.config), 100 * (step - 1), 100 * (peak - 1)))
    recipes, seen = root / "examples" / "configs", set()
    for path in sorted((root / "benchmarks" / "results").glob("scaling_*.json")):
        cluster = load_cluster(path.stem.split("_")[1].partition("x")[0])
        rows = predicted_again([Row(**row) for row in json.loads(path.read_text())["rows"]], recipes, cluster)
        for name in dict.fromkeys(row.case for row in rows):
            own = {row.metric: row.value for row in rows if row.case == name}
            case, measured = case_named(name), (own.get("step_ms"), own.get("peak_gib"))
            # Ways that come to the same were measured once.
            if case is None or None in measured or measured in seen:
                continue
            seen.add(measured)
            moe = _has_moe(load_config(case.path(recipes)))
            found.append(Errors(name, moe, own["step_error_percent"], own["peak_error_percent"]))
    return found


def truth(errors: Sequence[Errors]) -> str:
    """How far predictions are from what was measured, in words."""
    parts = []
    for models, moe in (("memory and dense models", False), ("MoE models", True)):
        own = [error for error in errors if error.moe == moe]
        if own:
            (peak, half_peak), (step, half_step) = (_most([getattr(error, what) for error in own]) for what in FIGURES)
            parts.append(
                f"{peak:g} % of peak memory and {step:g} % of step times on {len(own)} GPU runs of {models} (half of "
                f"them within {half_peak:g} % and {half_step:g} %)"
            )
    if not parts:
        return "Not measured yet"
    return f"Within {', '.join(parts)} of `benchmarks/results`; to some of them its constants were fitted"


def _most(errors: list[float]) -> tuple[float, float]:
    """(largest, median) without sign, rounded up to a tenth."""
    sizes = [abs(error) for error in errors]
    return math.ceil(10 * max(sizes)) / 10, math.ceil(10 * statistics.median(sizes)) / 10


def _known() -> Iterator[tuple[str, str, str, str, tuple[str, ...]]]:
    """(benchmark, hardware, case, config, settings)."""
    recipes = "examples/configs"
    small, eight = f"{recipes}/{SMALL}.yaml", ("train.micro_batch_size=4", "train.global_batch_size=32")
    for case, settings in CHECKED.items():  # 4 micro-batches a step
        larger = 2 if "train.micro_batch_size=8" in settings else 1
        sizes = ("train.micro_batch_size=4", f"train.global_batch_size={16 * larger}")
        yield "plan", "h100", f"{SMALL}/{case}", small, (*sizes, *settings)
    trained = [*WAYS.items(), (SMALL, PRESETS), (CUT, PRESETS)]
    for hardware in ("h100", "h200"):
        for recipe, ways in trained:
            folder = "benchmarks/configs" if recipe == CUT else recipes
            for way, settings in ways.items():
                yield "training", hardware, f"{recipe}/{way}", f"{folder}/{recipe}.yaml", (*eight, *settings)
    for case, settings in SHARED.items():
        yield "memory_parallel", "h200x2", case, small, (*eight, *settings)
    for case, settings in OFFLOADED.items():
        yield "offload", "h100", case, small, (*eight, *settings)


def _figures(root: Path, name: str) -> dict[str, dict[str, float]]:
    path, found = root / "benchmarks" / "results" / f"{name}.json", dict[str, dict[str, float]]()
    for row in json.loads(path.read_text())["rows"] if path.exists() else ():
        found.setdefault(row["case"], {})[row["metric"]] = row["value"]
    return found


def _has_moe(config: Config) -> bool:
    return config.model.moe.layers != "none"
