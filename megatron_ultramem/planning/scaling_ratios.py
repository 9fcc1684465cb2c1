"""What follows from several cases of tools/bench_scaling.py: weak-scaling efficiency, and speed over the MoE's."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from megatron_ultramem.planning.scaling import FP8, MEMORY, MOE, WAYS
from megatron_ultramem.results import Row

# Of forward and backward alone, and of whole steps: speed, its share of the ideal, and times the MoE's.
RATIOS = (
    ("tokens_per_s", "scaling_efficiency_percent", "times_the_moe"),
    ("tokens_per_s_with_optimizer", "step_scaling_efficiency_percent", "step_times_the_moe"),
)
COMPARED = tuple(name for _, *names in RATIOS for name in names)


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows with the scaling efficiency of every case, and its speed over the MoE's."""
    found = [row for row in rows if row.metric not in COMPARED]
    for metric, efficiency, times in RATIOS:
        speeds = {row.case: row.value for row in found if row.metric == metric}
        found += _efficiencies(speeds, efficiency)
        found += [
            Row(case, times, speed / speeds[moe], "x")
            for case, speed in speeds.items()
            if case.startswith(f"{MEMORY}/") and (moe := fastest_moe(speeds, way_and_ranks(case)[1]))
        ]
    return found


def _efficiencies(speeds: Mapping[str, float], metric: str) -> Iterator[Row]:
    for case, speed in speeds.items():
        if base := efficiency_base(case, speeds):
            (way, ranks), (base_way, base_ranks) = way_and_ranks(case), way_and_ranks(base)
            name = f"x{base_ranks}" if base_way == way else base.partition("/")[2]
            yield Row(case, metric, 100 * speed / (speeds[base] * ranks / base_ranks), f"% of {name}")


def efficiency_base(case: str, measured: Collection[str]) -> str | None:
    """The case that another one's efficiency is against: the same way on one rank; otherwise a way on one rank that
    splits nothing, in the same precision; otherwise the same way on the fewest ranks. None: there is none, or the model
    has as many layers as fit on these ranks."""
    way, ranks = way_and_ranks(case)
    known = next((known for known in WAYS if f"{known.recipe}/{known.name}" == way), None)
    if known is not None and known.cut == 0:
        return None
    fewest = min((count for own, count in map(way_and_ranks, measured) if own == way), default=ranks)
    bases = (f"{way}_x1", f"{_unsplit(way)}_x1", f"{way}_x{fewest}")
    base = next((base for base in bases if base in measured), None)
    return base if base is not None and way_and_ranks(base)[1] < ranks else None


def _unsplit(way: str) -> str:
    """The way on one rank whose model and precision are those of `way`."""
    recipe, _, name = way.partition("/")
    if recipe == MOE:
        return way.removesuffix("_tp2").removesuffix("_pp2")
    if recipe == MEMORY:
        in_fp8 = any(FP8 in known.settings for known in WAYS if (known.recipe, known.name) == (recipe, name))
        return f"{recipe}/columns_fp8" if in_fp8 else f"{recipe}/columns"
    return way


def fastest_moe(speeds: Mapping[str, float], ranks: int) -> str | None:
    """The case of the MoE with the highest speed on so many ranks; None if there is none."""
    own = [case for case in speeds if case.startswith(f"{MOE}/") and way_and_ranks(case)[1] == ranks]
    return max(own, key=lambda case: speeds[case], default=None)


def way_and_ranks(case: str) -> tuple[str, int]:
    """('recipe/way', ranks) of a case's name."""
    way, _, ranks = case.rpartition("_x")
    return way, int(ranks)
