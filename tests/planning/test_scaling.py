"""The cases of tools/bench_scaling.py: which come first, are legal and fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.planning import scaling
from megatron_ultramem.planning.clusters import Cluster, load_cluster
from megatron_ultramem.planning.evaluate import Evaluation
from megatron_ultramem.side_by_side import dealt

RECIPES = Path(__file__).parents[2] / "examples" / "configs"


def plan_of(case: scaling.Case, cluster: Cluster) -> tuple[list[str], Evaluation]:
    return scaling.plan_of(RECIPES, [scaling.UNUSED_DATA], case, cluster)


def test_a_split_model_begins_with_the_fewest_ranks() -> None:
    names = [case.name for case in scaling.cases([1, 2, 4], None)]
    assert len(set(names)) == len(names)
    assert not {f"{scaling.MEMORY}/columns_tp2_x1", f"{scaling.MOE}/moe_pp2_x1"} & set(names)
    assert names.index(f"{scaling.MEMORY}/columns_pp2_x2") < names.index(f"{scaling.MEMORY}/columns_pp2_x4")


def test_short_runs_on_four_gpus_come_to_the_goals_first() -> None:
    cluster, same = load_cluster("h200"), dict[tuple[object, ...], scaling.Case]()
    for case in scaling.cases([1, 2, 4], None)[:24]:
        planned = scaling.Planned(case, *plan_of(case, cluster))
        if planned.plan.fits:
            same.setdefault(planned.identity, case)
    jobs = list(same.values())
    rounds: list[set[str]] = []
    for number, places in dealt([case.ranks for case in jobs], 4):
        if places[0] == 0:
            rounds.append(set())
        rounds[-1].add(jobs[number].name.partition("/")[2])
    assert rounds[:9] == [
        {"columns_x4"}, {"columns_x1", "columns_x2", "columns_fp8_x1"}, {"columns_overlap_x4"},
        {"moe_x4"}, {"moe_cutlass_x4"}, {"columns_fp8_x4"}, {"cut_columns_x4"},
        {"columns_tp2_x2", "cut_columns_x2"}, {"columns_pp2_x2", "columns_fp8_x2"},
    ]  # fmt: skip


@pytest.mark.parametrize("recipe", [scaling.MEMORY, scaling.LARGE])
def test_every_recipe_with_memory_runs_by_all_placements_split_in_two_ways_and_in_fp8(recipe: str) -> None:
    ways = {one for way in scaling.WAYS if way.recipe == recipe for one in way.settings}
    assert ways >= {scaling.COLUMNS, scaling.ROWS, scaling.AUTO, scaling.TP2, scaling.PP2, scaling.FP8}
    four = [case for case in scaling.cases([4], None) if case.way.recipe == recipe]
    assert all(plan_of(case, load_cluster("h200"))[1].fits for case in four)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_cases_of_whole_recipes_are_legal_and_fit_an_h200(ranks: int) -> None:
    whole = [case for case in scaling.cases([ranks], None) if case.way.cut is None]
    too_large = [case.name for case in whole if not plan_of(case, load_cluster("h200"))[1].fits]
    assert too_large == ([f"{scaling.MOE}/moe_fp8_x1"] if ranks == 1 else [])  # experts in FP8 beside those in bf16


def test_a_cut_model_has_the_most_layers_that_fit() -> None:
    cluster = load_cluster("h200")
    (two,) = (case for case in scaling.cases([2], ["cut_columns"]))
    settings, plan = plan_of(two, cluster)
    layers = plan.config.model.num_layers
    assert plan.fits and layers < 32 and settings[-1] == f"model.num_layers={layers}"
    deeper = load_config(two.path(RECIPES), [*settings, f"model.num_layers={layers + 4}"])
    assert not scaling.evaluate(deeper, 2, cluster).fits
    (four,) = (case for case in scaling.cases([4], ["cut_of_2_columns"]))
    assert plan_of(four, cluster)[0][-1] == settings[-1]


def test_cases_that_come_to_the_same_are_known_to_be_the_same() -> None:
    cluster = load_cluster("h200")
    found = {
        case.name.partition("/")[2]: scaling.Planned(case, *plan_of(case, cluster)).identity
        for case in scaling.cases([1, 4], ["columns", "rows", "auto", "columns_overlap", "columns_fp8"])
    }
    assert len({found[f"{way}_x1"] for way in ("columns", "rows", "auto", "columns_overlap")}) == 1
    assert found["columns_fp8_x1"] != found["columns_x1"]
    assert len({found[f"{way}_x4"] for way in ("columns", "rows", "columns_overlap", "columns_fp8")}) == 4
    assert found["auto_x4"] == found["columns_x4"]


def test_graphs_of_layers_and_memory_that_moves_go_with_buffers_that_nccl_leaves_alone() -> None:
    recorded = [way for way in scaling.WAYS if "train.cuda_graphs=layers" in way.settings or way.recipe != scaling.MOE]
    moving = [way for way in recorded if scaling.SEGMENTS in way.environment]
    assert {"moe_graphs_cutlass", "cut_columns"} <= {way.name for way in moving}
    assert all(scaling.UNREGISTERED in way.environment for way in moving)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_has_four_micro_batches_of_work_however_the_model_is_split(ranks: int) -> None:
    for case in scaling.cases([ranks], ["columns", "columns_tp2", "columns_pp2", "moe", "moe_tp2", "moe_pp2"]):
        train = load_config(case.path(RECIPES), case.settings(RECIPES, [scaling.UNUSED_DATA])).train
        assert train.global_batch_size == train.micro_batch_size * scaling.MICRO_BATCHES * ranks, case.name
    # Half of the work in twice as many micro-batches takes about as long; TP and PP besides, hardly longer than that.
    cluster = load_cluster("h200")
    (whole,), *split = (scaling.cases([ranks], [way]) for way in ("columns", "columns_tp2", "columns_pp2"))
    step = plan_of(whole, cluster)[1].time.seconds
    assert all(step < plan_of(case, cluster)[1].time.seconds < 1.3 * step for (case,) in split)


def test_figures_of_cases_lead_back_to_them() -> None:
    for case in scaling.cases([1, 2, 8], None):
        assert scaling.case_named(case.name) == case
    assert scaling.case_named(f"{scaling.MEMORY}/other_x2") is None
