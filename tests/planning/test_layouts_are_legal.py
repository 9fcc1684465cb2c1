"""Layouts that are recommended are layouts that `train` takes, as the settings that are printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.config.validate import validate, validate_world
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.planning.clusters import Cluster, load_cluster
from megatron_ultramem.planning.evaluate import Evaluation, Evaluator, on_cluster
from megatron_ultramem.planning.memory import GIB
from megatron_ultramem.planning.plan import make_plan
from megatron_ultramem.planning.search import as_overrides, search

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
# Of each kind of model one at once; the others take as long and are slow together.
FAST = ("ultramemv2_227m_1b", "ultramem_227m_1b", "olmoe_227m_1b", "dense_227m", "ultramemv2_2_5b_25b")
RECIPES = [
    pytest.param(name, marks=[] if name in FAST else pytest.mark.slow)
    for name in sorted(path.stem for path in CONFIGS.glob("*.yaml"))
]
VOCABULARY = 50304
ENOUGH_GIB = 300  # for every recipe on 8 GPUs


def layouts(config: Config, gpus: int, cluster: Cluster) -> list[Evaluation]:
    config = on_cluster(config, cluster)
    return search(Evaluator(config, VOCABULARY, cluster), config, gpus).fitting


def check_printed(name: str, given: Sequence[str], found: Evaluation, cluster: Cluster) -> None:
    """What is printed, put behind the settings that were given, is legal and makes the layout that was judged."""
    path = CONFIGS / f"{name}.yaml"
    printed = as_overrides(found.settings(load_config(path, given))).split()
    config = load_config(path, [*given, *printed])
    validate_world(config, found.layout.gpus)
    config = on_cluster(config, cluster)
    if found.layout.placement.placement == "two_level":
        assert config.parallel.memory_columns == found.layout.placement.columns
    assert config == found.config


@pytest.mark.parametrize("name", RECIPES)
def test_of_every_recipe_with_memory_enough_and_with_little(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    wide = load_cluster("h100", [f"cluster.memory_gib={ENOUGH_GIB}"])
    fitting = layouts(config, 8, wide)
    least = min(found.memory.required for found in fitting if found.recompute == "none") / GIB
    little = load_cluster("h100", [f"cluster.memory_gib={0.98 * least + wide.reserved_gib}"])
    tight = layouts(config, 8, little)
    assert tight
    for found in fitting + tight:
        validate(found.config)
        assert validate_world(found.config, 8) == found.layout.data
    for found in [*fitting[:2], *tight[:2]]:
        check_printed(name, [], found, little)


BLOCKS, TWO_LEVELS = "ultramemv2_500m_6_8b_block6", [
    "parallel.memory_parallel_size=8", "parallel.memory_placement=two_level", "parallel.memory_columns=4",
]  # fmt: skip
RESET = {
    "columns": (BLOCKS, 8, TWO_LEVELS),
    "sequence": (BLOCKS, 8, ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"]),
    "no-sequence": ("dense_227m", 8, ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=false"]),
    "overlap": ("ultramemv2_227m_1b", 8, ["parallel.memory_parallel_size=2", "parallel.overlap_exchange=true"]),
    "capacity": ("ultramemv2_227m_1b", 8, [
        "parallel.memory_parallel_size=4", "parallel.memory_placement=rows", "parallel.exchange_capacity=8",
    ]),
    "p2p": (BLOCKS, 8, [
        "parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_stages=2", "parallel.overlap_p2p=true",
    ]),
    "columns-large": ("ultramemv2_2_5b_25b", 16, TWO_LEVELS),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "gpus", "given"),
    [pytest.param(*case, id=key, marks=pytest.mark.slow if "large" in key else ()) for key, case in RESET.items()],
)
def test_what_a_config_says_of_its_own_layout_is_taken_back(name: str, gpus: int, given: list[str]) -> None:
    cluster = load_cluster("h200")
    fitting = layouts(load_config(CONFIGS / f"{name}.yaml", given), gpus, cluster)
    kinds = {(found.layout.tensor, found.layout.chunks, found.layout.placement.placement): found for found in fitting}
    assert len(kinds) > 1
    for found in kinds.values():
        check_printed(name, given, found, cluster)


def test_room_for_rows_hides_no_other_placement() -> None:
    given = ["parallel.memory_parallel_size=8", "parallel.memory_placement=rows", "parallel.exchange_capacity=8"]
    fitting = layouts(load_config(CONFIGS / "ultramemv2_1b_7b.yaml", given), 8, load_cluster("h200"))
    of_eight = {
        found.layout.placement.placement: found.config.parallel.exchange_capacity
        for found in fitting
        if found.layout.expert_group == 8
    }
    assert of_eight == {"rows": 8, "columns": None, "two_level": 8}


def test_the_settings_of_the_configs_own_layout_give_it_again() -> None:
    """Its placement was chosen automatically: two levels, whose columns are named only beside that placement."""
    given = ["parallel.memory_parallel_size=16", "parallel.memory_placement=auto"]
    config = load_config(CONFIGS / "ultramemv2_1b_7b.yaml", given)
    plan = make_plan(config, VOCABULARY, load_cluster("h200", ["cluster.gpus_per_node=4"]), look_for_layouts=False)
    assert plan.shown.layout.placement.placement == "two_level"
    printed = as_overrides(plan.shown.settings(config)).split()
    assert "parallel.memory_columns=4" in printed
    load_config(CONFIGS / "ultramemv2_1b_7b.yaml", [*given, *printed])


@pytest.mark.parametrize(("gpus", "memory_gib"), [(1, 24), (2, 25), (8, 24)])
def test_memory_that_joins_other_blocks_is_never_recomputed_with_them(gpus: int, memory_gib: int) -> None:
    """Neither in a layout, nor in the closest one, nor on the smallest cluster that would do."""
    config = load_config(CONFIGS / "ultramem_227m_1b.yaml")
    try:
        plan = make_plan(config, VOCABULARY, load_cluster("h100", [f"cluster.memory_gib={memory_gib}"]), gpus)
    except ConfigError as error:
        assert "recompute full" not in str(error) and "recompute memory" in str(error)
        smallest = str(error).split("the smallest cluster that would do: ")[1]
        size, _, settings = smallest.partition(" x h100, with ")
        validate_world(load_config(CONFIGS / "ultramem_227m_1b.yaml", settings.split()), int(size))
        return
    assert set(plan.modes) == {"none", "selective", "memory"}
    assert plan.found is not None and plan.found.fitting
    for found in plan.found.fitting:
        validate(found.config)


def test_experts_that_need_company_are_planned_in_their_own_layout() -> None:
    given = ["model.moe.dispatcher=flex", "parallel.expert_parallel_size=8"]
    plan = make_plan(load_config(CONFIGS / "olmoe_1b_7b.yaml", given), VOCABULARY, load_cluster("h100"), 8)
    assert plan.problem == "" and plan.found is not None
    assert all(found.layout.expert_group * found.layout.tensor > 1 for found in plan.found.fitting)


def test_what_is_wrong_in_the_configs_layout_and_without_any_is_said_of_its_own() -> None:
    given = ["model.moe.dispatcher=flex", "parallel.expert_parallel_size=7"]
    config = load_config(CONFIGS / "olmoe_1b_7b.yaml", given, check=False)
    with pytest.raises(ConfigError, match="parallel.expert_parallel_size = 7 does not divide"):
        make_plan(config, VOCABULARY, load_cluster("h100"), 8)
