"""Layouts: which fit, which is best, and what is said where none does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.config.validate import validate, validate_world
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.parallel.cost_model import choose
from megatron_ultramem.planning.clusters import load_cluster
from megatron_ultramem.planning.evaluate import Evaluator, on_cluster
from megatron_ultramem.planning.memory import GIB
from megatron_ultramem.planning.plan import make_plan
from megatron_ultramem.planning.search import Found, any_fits, as_overrides, search

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
SMALL = [
    "model.num_layers=8", "model.memory.sharing=block", "model.memory.share_size=2", "model.vocab_size=50304",
    "train.global_batch_size=16",
]  # fmt: skip


def recipe(name: str, *settings: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", settings)


def found(config: Config, gpus: int, cluster: str = "h100") -> Found:
    machine = load_cluster(cluster)
    config = on_cluster(config, machine)
    return search(Evaluator(config, config.model.vocab_size or 0, machine), config, gpus)


def test_every_layout_found_is_legal_fits_and_uses_all_gpus() -> None:
    result = found(load_config(None, SMALL), 8)
    assert len(result.fitting) > 10
    for layout in result.fitting:
        validate(layout.config)
        assert validate_world(layout.config, 8) == layout.layout.data
        assert layout.memory.required <= load_cluster("h100").usable_gib * GIB
        settings = as_overrides(layout.settings(load_config(None, SMALL))).split()
        assert validate_world(load_config(None, [*SMALL, *settings]), 8) == layout.layout.data


def test_settings_of_two_levels_name_the_columns_of_the_clusters_nodes() -> None:
    machine = load_cluster("h100", ["cluster.gpus_per_node=4"])
    config = on_cluster(load_config(None, [*SMALL, "parallel.ranks_per_node=8"]), machine)
    fitting = search(Evaluator(config, 50304, machine), config, 16).fitting
    layout = next(one for one in fitting if one.layout.placement.placement == "two_level")
    settings = as_overrides(layout.settings(config)).split()
    chosen = choose(load_config(None, [*SMALL, "parallel.ranks_per_node=8", *settings]))
    assert (chosen.placement, chosen.columns) == ("two_level", 4)


def test_layouts_are_ranked_by_speed() -> None:
    speeds = [layout.time.tokens_per_s for layout in found(load_config(None, SMALL), 8).fitting]
    for earlier, later in zip(speeds, speeds[1:], strict=False):
        assert later < 1.011 * earlier


def test_a_ring_over_all_layers_is_never_split_over_stages() -> None:
    result = found(recipe("ultramemv2_227m_1b"), 8)
    assert {layout.layout.pipeline for layout in result.fitting} == {1}


@pytest.mark.slow
def test_the_120b_recipe_is_laid_out_on_64_gpus_and_needs_sharded_tables() -> None:
    best = found(recipe("ultramemv2_2_5b_120b_top256"), 64).fitting
    assert all(layout.layout.pipeline * layout.layout.expert_group >= 8 for layout in best)


@pytest.mark.slow
def test_120b_on_1024_gpus_takes_seconds() -> None:
    config, began = recipe("ultramemv2_2_5b_120b_top256"), time.process_time()
    assert found(config, 1024).fitting
    assert time.process_time() - began < 20


def test_where_memory_binds_the_message_says_what_and_how_many_gpus_would_do() -> None:
    config = recipe("ultramemv2_2_5b_120b_top256")
    with pytest.raises(ConfigError) as error:
        make_plan(config, 50304, load_cluster("h100"), 8)
    said = str(error.value)
    assert "no layout fits 8 x h100: memory binds: the layout that comes closest" in said
    assert "table optimizer" in said
    gpus = int(said.split("the smallest cluster that would do: ")[1].split(" x h100")[0])
    assert gpus > 8
    assert found(config, gpus).fitting and not found(config, 8).fitting
    settings = said.split("with ")[-1].split()
    validate_world(recipe("ultramemv2_2_5b_120b_top256", *settings), gpus)


def test_where_the_batch_binds_the_message_names_it() -> None:
    with pytest.raises(ConfigError) as error:
        make_plan(load_config(None, [*SMALL, "train.global_batch_size=3"]), 50304, load_cluster("h100"), 128)
    said = str(error.value)
    assert "the global batch binds: train.global_batch_size = 3 is not a multiple" in said
    assert "the smallest cluster that would do: 1 x h100" in said
    largest = int(said.split("the largest with fewer GPUs: ")[1].split(" x h100")[0])
    assert 1 < largest < 128
    settings = said.split("with ")[-1].split()
    validate_world(load_config(None, [*SMALL, "train.global_batch_size=3", *settings]), largest)


def test_the_smallest_cluster_has_whole_nodes_of_any_number() -> None:
    """Heads and layers that no power of two divides, and a batch that five does."""
    sizes = ["model.hidden_size=960", "model.num_attention_heads=15", "model.num_layers=25"]
    config = load_config(None, [*sizes, "model.memory.layers=none", "train.global_batch_size=80"])
    machine = load_cluster("h100", ["cluster.memory_gib=7"])
    with pytest.raises(ConfigError, match="the smallest cluster that would do: 40 x h100"):
        make_plan(config, 50304, machine, 8)
    evaluator = Evaluator(config, 50304, machine)
    fitting = [gpus for gpus in (*range(1, 9), 16, 24, 32, 40) if any_fits(evaluator, config, gpus)]
    assert fitting == [40]


def test_where_nothing_fits_the_configs_own_layout_is_explained_too() -> None:
    config = load_config(CONFIGS / "ultramem_227m_1b.yaml", ["parallel.pipeline_parallel_size=5"], check=False)
    with pytest.raises(ConfigError) as error:
        make_plan(config, 50304, load_cluster("h100"), 5)
    said = str(error.value)
    assert said.startswith("the config's own layout: model.memory.join_layers = '4,9,14,19': memory that reads layer 0")
    assert "no layout fits 5 x h100: the global batch binds" in said


def test_the_configs_own_layout_is_enough_where_the_search_has_no_such() -> None:
    """Three ranks share the rows: sizes that the search does not try."""
    settings = ["model.memory.rows_multiple=3", "parallel.memory_parallel_size=3", "parallel.memory_placement=rows"]
    config = load_config(None, [*SMALL, *settings, "model.memory.num_keys=720", "train.global_batch_size=12"])
    plan = make_plan(config, 50304, load_cluster("h100", ["cluster.memory_gib=17.5"]), 3)
    assert plan.problem == "" and plan.found is not None
    assert plan.found.fitting == [plan.shown]


def test_a_layout_that_does_not_fit_is_explained_beside_those_that_do() -> None:
    plan = make_plan(recipe("ultramemv2_2_5b_25b"), 50304, load_cluster("h200"), 8)
    assert "GiB, and a rank can use 135.8 of 139.8 GiB" in plan.problem and "table gradients" in plan.problem
    assert plan.found is not None and plan.found.fitting


def test_an_illegal_layout_is_explained_and_others_are_shown() -> None:
    config = load_config(None, [*SMALL, "parallel.pipeline_parallel_size=3"], check=False)
    plan = make_plan(config, 50304, load_cluster("h100"), 8)
    assert "model.num_layers = 8 cannot be split evenly" in plan.problem
    assert plan.shown is plan.found.fitting[0]  # type: ignore[union-attr]


def test_what_is_wrong_under_any_layout_is_refused_at_once() -> None:
    config = load_config(None, [*SMALL, "model.memory.share_size=3"], check=False)
    with pytest.raises(ConfigError, match="share_size=3 does not divide"):
        make_plan(config, 50304, load_cluster("h100"), 8)


def test_faster_links_never_slow_a_layout_down() -> None:
    settings = [*SMALL, "parallel.memory_parallel_size=8", "parallel.tensor_parallel_size=2"]
    slow, fast = (
        make_plan(load_config(None, settings), 50304, load_cluster("h100", [f"cluster.intra_node_gb_per_s={speed}"]), 8,
                  look_for_layouts=False).shown.time.seconds
        for speed in (100, 400)
    )  # fmt: skip
    assert fast < slow
