"""What tools/bench_scaling.py runs: recipes in several ways on growing numbers of ranks, most important first, and what
the planner says of each."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import ConfigError, UserError
from megatron_ultramem.planning.clusters import Cluster
from megatron_ultramem.planning.evaluate import ONE_GROUPED_GEMM, Evaluation, Evaluator, on_cluster
from megatron_ultramem.planning.memory import GIB
from megatron_ultramem.results import Row

MICRO_BATCHES = 4  # for every rank, per step; ranks that split a model have twice as many, of half the work each
STEPS = 12  # of the schedule and the data: more than are taken
FAST = "preset=throughput"
FP8 = "preset=throughput_fp8"  # products and tables
FP8_PRODUCTS = "train.fp8.recipe=tensorwise"  # of which the tables' copies need no room
TP2, PP2 = "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"
PLACEMENT = "parallel.memory_placement="
ALL_FIT = "parallel.exchange_capacity=1e9"  # static sizes, which CUDA graphs need
BESIDE_FFN = "parallel.overlap_exchange=true"
ROUTER, ALLGATHER = "model.moe.router_fusion=true", "model.moe.dispatcher=allgather"
# Of attention and routers; Megatron's do not go with weight gradients that are fused into their GEMMs.
GRAPHS = ("train.cuda_graphs=layers", "train.fused_weight_gradients=false")
# The experts' sizes follow the router, and no two micro-batches ask for the same: without it memory falls to pieces.
SEGMENTS = ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# Graphs beside it: NCCL would register their memory, which may be mapped elsewhere later.
UNREGISTERED = ("NCCL_GRAPH_REGISTER", "0")
CUTLASS = (ONE_GROUPED_GEMM, "1")  # one launch for all experts, where cuBLAS has one for each
# Tables that fill a GPU: their moments do not fit into pieces that the first backward pass leaves.
NO_PIECES = (SEGMENTS, UNREGISTERED)


@dataclass(frozen=True)
class Way:
    """Of running a recipe: settings, and variables of the environment. `cut`: to as many layers as fit on so many ranks
    (0: on those of the case). `step_down`: on its second number of ranks it is as important as the way so many places
    further down is on its first."""

    recipe: str
    name: str
    settings: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    cut: int | None = None
    step_down: int = 6

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
COLUMNS, ROWS, AUTO = (f"{PLACEMENT}{name}" for name in ("columns", "rows", "auto"))
WAYS = [  # most important first
    Way(MEMORY, "columns", (FAST, COLUMNS), step_down=1),
    Way(MEMORY, "columns_overlap", (FAST, COLUMNS, BESIDE_FFN), step_down=4),
    Way(MOE, "moe", (FAST, ROUTER), (SEGMENTS,), step_down=8),
    Way(MOE, "moe_cutlass", (FAST, ROUTER), (SEGMENTS, CUTLASS)),
    Way(MEMORY, "columns_fp8", (FP8, COLUMNS), step_down=2),
    Way(LARGE, "cut_columns", (FAST, COLUMNS), NO_PIECES, cut=0, step_down=1),
    Way(MEMORY, "columns_tp2", (FAST, COLUMNS, TP2)),
    Way(MEMORY, "columns_pp2", (FAST, COLUMNS, PP2)),
    Way(MEMORY, "rows", (FAST, ROWS, ALL_FIT)),
    Way(MEMORY, "auto", (FAST, AUTO)),
    Way(MOE, "moe_graphs_cutlass", (FAST, ROUTER, *GRAPHS), (SEGMENTS, CUTLASS, UNREGISTERED)),
    Way(LARGE, "cut_columns_fp8", (FP8, COLUMNS), NO_PIECES, cut=0),
    Way(LARGE, "cut_columns_fp8_products", (FAST, COLUMNS, FP8_PRODUCTS), NO_PIECES, cut=0),
    Way(LARGE, "cut_columns_tp2", (FAST, COLUMNS, TP2), NO_PIECES, cut=0),
    Way(LARGE, "cut_columns_pp2", (FAST, COLUMNS, PP2), NO_PIECES, cut=0),
    Way(LARGE, "cut_rows", (FAST, ROWS, ALL_FIT), NO_PIECES, cut=0),
    Way(LARGE, "cut_auto", (FAST, AUTO), NO_PIECES, cut=0),
    Way(MOE, "moe_fp8", (FP8, ROUTER), (SEGMENTS,)),
    Way(LARGE, "cut_of_2_columns", (FAST, COLUMNS), NO_PIECES, cut=2),
    Way(MOE, "moe_allgather_cutlass", (FAST, ROUTER, ALLGATHER), (SEGMENTS, CUTLASS)),
    Way(MOE, "moe_pp2", (FAST, ROUTER, PP2), (SEGMENTS,)),
    Way(MOE, "moe_tp2", (FAST, ROUTER, TP2), (SEGMENTS,)),
]  # fmt: skip
PREDICTED = ("predicted_step_ms", "predicted_peak_gib", "step_error_percent", "peak_error_percent")
UNUSED_DATA = "data.paths=[unused]"  # a plan reads none


@dataclass(frozen=True)
class Case:
    way: Way
    ranks: int

    @property
    def name(self) -> str:
        return f"{self.way.recipe}/{self.way.name}_x{self.ranks}"

    def settings(self, recipes: Path, overrides: Sequence[str]) -> list[str]:
        """All that is set on top of the recipe, but for layers."""
        way = list(self.way.settings)
        shared = self.ranks // (2 if PP2 in way else 1)
        if shared == 1:  # nothing to place
            way = [one for one in way if not one.startswith(PLACEMENT) and one not in (ALL_FIT, BESIDE_FFN)]
        micro = _recipe(self.path(recipes), tuple(overrides)).train.micro_batch_size
        return [
            *overrides, *way, f"{SHARED_BY[self.way.recipe]}={shared}",
            f"train.global_batch_size={micro * MICRO_BATCHES * self.ranks}",
            f"train.steps={STEPS}", "schedule.warmup_steps=1",
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
        (place + way.step_down * number, Case(way, count))
        for place, way in enumerate(WAYS)
        for number, count in enumerate(
            [count for count in (rising if way.halves else most_first) if count >= way.least_ranks]
        )
        if ways is None or way.name in ways
    ]
    return [case for _, case in sorted(found, key=lambda entry: entry[0])]


def case_named(name: str) -> Case | None:
    """The case of a name in a results file; None if no way is called so any more."""
    way, _, ranks = name.rpartition("_x")
    return next((Case(known, int(ranks)) for known in WAYS if f"{known.recipe}/{known.name}" == way), None)


def beside_the_plan(case: Case, plan: Evaluation, rows: Sequence[Row]) -> list[Row]:
    """What was measured of a case, with what the planner says of it."""
    measured = [row for row in rows if row.metric not in PREDICTED]
    found = [dataclasses.replace(row, case=case.name) for row in measured]
    predicted = {"step_ms": plan.time.seconds * 1e3, "peak_gib": plan.memory.peak / GIB}
    for real in measured:
        if (value := predicted.get(real.metric)) is not None:
            error_name = f"{real.metric.split('_')[0]}_error_percent"
            found.append(Row(case.name, f"predicted_{real.metric}", value, real.unit))
            found.append(Row(case.name, error_name, 100 * (value / real.value - 1), "% of the measured"))
    return found


def predicted_again(rows: Sequence[Row], recipes: Path, cluster: Cluster) -> list[Row]:
    """Rows of a results file with what the planner says now of every case that was measured and still exists; one that
    was cut has the layers that it was measured with."""
    found: list[Row] = []
    for name in dict.fromkeys(row.case for row in rows):
        own, case = [row for row in rows if row.case == name], case_named(name)
        if case is None or all(row.metric != "step_ms" for row in own):
            found += own
            continue
        layers = [f"model.num_layers={row.value:.0f}" for row in own if row.metric == "layers"]
        config = load_config(case.path(recipes), [*case.settings(recipes, [UNUSED_DATA]), *layers])
        found += beside_the_plan(case, evaluate(config, case.ranks, cluster, case.way.environment), own)
    return found


def plan_of(recipes: Path, overrides: Sequence[str], case: Case, cluster: Cluster) -> tuple[list[str], Evaluation]:
    """The settings of a case and what the planner says of it; a model that is cut has the most layers that fit, or
    those of the smallest legal one. Raises ConfigError where no layout is legal."""
    settings = case.settings(recipes, overrides)
    config = load_config(case.path(recipes), settings)
    model = config.model
    if case.way.cut and case.way.cut != case.ranks:
        _, smaller = plan_of(recipes, overrides, Case(case.way, case.way.cut), cluster)
        choices = [smaller.config.model.num_layers]
    elif case.way.cut is not None:
        choices = list(range(model.num_layers, 0, -(model.memory.share_size if model.memory.sharing == "block" else 1)))
    else:
        choices = [model.num_layers]
    environment = {**dict(case.way.environment), **os.environ}.items()  # what is set already stays
    problem: ConfigError | None = None
    last: Evaluation | None = None
    for layers in choices:
        model = dataclasses.replace(model, num_layers=layers)
        try:
            last = evaluate(dataclasses.replace(config, model=model), case.ranks, cluster, environment)
        except ConfigError as error:
            problem = error
            continue
        if last.fits:
            break
    if last is None:
        assert problem is not None
        raise problem
    return [*settings, f"model.num_layers={last.config.model.num_layers}"], last


def evaluate(config: Config, ranks: int, cluster: Cluster, environment: Iterable[tuple[str, str]] = ()) -> Evaluation:
    planned = on_cluster(config, cluster)
    assert config.model.vocab_size is not None, "the recipes name it"
    evaluator = Evaluator(planned, config.model.vocab_size, cluster, dict(environment))
    if problem := evaluator.problem(planned, ranks):
        raise ConfigError(problem)
    return evaluator.evaluate(planned, ranks)
