"""Memory-parallel settings that contradict each other are refused with the setting, its value and what is legal."""

from __future__ import annotations

import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.config.validate import validate_world
from megatron_ultramem.errors import ConfigError

P2, P4 = "parallel.memory_parallel_size=2", "parallel.memory_parallel_size=4"
ROWS, COLUMNS, TWO_LEVEL = (f"parallel.memory_placement={name}" for name in ("rows", "columns", "two_level"))
MOE = ["model.moe.layers=0", "model.memory.layers=1-19"]

REFUSED = {
    "nothing-to-share": ([P2, "model.memory.layers=none"], "without memory layers"),
    "replicated-over-ranks": ([P2, "parallel.memory_placement=replicated"], "legal: auto, rows"),
    "placement-without-ranks": ([ROWS], "would be ignored with parallel.memory_parallel_size = 1"),
    "overlap-without-ranks": (["parallel.overlap_exchange=true"], "overlap_exchange = True would be ignored"),
    "capacity-without-ranks": (["parallel.exchange_capacity=2"], "exchange_capacity = 2.0 would be ignored"),
    "capacity-of-columns": ([P2, COLUMNS, "parallel.exchange_capacity=2"], "memory_placement = rows"),
    "rows-that-do-not-divide": (
        ["parallel.memory_parallel_size=5", ROWS],
        "5 ranks do not divide the 129664 rows of a pool",
    ),
    "value-columns-that-do-not-divide": (
        ["parallel.memory_parallel_size=5", COLUMNS],
        "5 ranks do not divide model.memory.value_dim = 192",
    ),
    "auto-without-a-way": (["parallel.memory_parallel_size=5"], "rows: 5 ranks do not divide"),
    "auto-without-a-way-of-two-levels": (
        ["parallel.memory_parallel_size=14"],
        "two_level (7 x 2): 7 ranks do not divide the 129664 rows",
    ),
    "two-levels-of-one-node": ([P4, TWO_LEVEL], "memory_columns = null: 4 of parallel.memory_parallel_size = 4 ranks"),
    "two-levels-of-nodes-of-one": (
        ["parallel.memory_parallel_size=12", TWO_LEVEL, "parallel.ranks_per_node=1"],
        "memory_columns = null: 1 of parallel.memory_parallel_size = 12 ranks to share columns",
    ),
    "two-levels-that-do-not-divide": (
        ["parallel.memory_parallel_size=12", TWO_LEVEL, "parallel.memory_columns=5"],
        "legal: parallel.memory_columns = 2 or 3 or 4 or 6",
    ),
    "two-levels-of-a-prime": (["parallel.memory_parallel_size=5", TWO_LEVEL], "legal: another placement"),
    "columns-beside-auto": (["parallel.memory_parallel_size=16", "parallel.memory_columns=4"], "placement = auto"),
    "columns-of-one-level": ([P4, ROWS, "parallel.memory_columns=2"], "memory_columns = 2 would be ignored"),
    "experts-in-another-group": ([P2, *MOE], "value tables and experts share one group"),
    "tables-outside-the-experts-group": (["parallel.expert_parallel_size=2", *MOE], "legal: equal sizes"),
    "experts-that-do-not-divide": (
        [P2, "parallel.expert_parallel_size=2", *MOE, "model.moe.num_experts=9"],
        "does not divide model.moe.num_experts = 9",
    ),
    "rows-beyond-32-bits": ([P2, "model.memory.num_keys=50000"], "exchanged row numbers have 32 bits"),
    "overlap-with-gathers": (
        [
            P2,
            "parallel.overlap_exchange=true",
            "parallel.overlap_grad_reduce=true",
            "parallel.overlap_param_gather=true",
        ],
        "legal: one of the two",
    ),
    "a-split-pool": (
        [P2, "parallel.pipeline_parallel_size=2", "model.memory.sharing=ring", "model.memory.share_size=2"],
        "would split pool 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        load_config(None, settings)
    assert message in str(caught.value) and "legal" in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        [P2],
        [P2, ROWS, "parallel.exchange_capacity=1.5"],
        [P4, TWO_LEVEL, "parallel.memory_columns=2"],
        [P2, "parallel.expert_parallel_size=2", *MOE],
        [P2, "parallel.overlap_exchange=true"],
        ["parallel.memory_parallel_size=8", COLUMNS],  # narrow: a warning, not an error
        ["parallel.memory_parallel_size=12"],  # by narrow columns: rows do not divide
        ["parallel.memory_parallel_size=12", "parallel.exchange_latency_us=1000"],
        ["parallel.memory_parallel_size=12", "parallel.intra_node_gb_per_s=5", "model.memory.top_m=256"],
    ],
    ids=str,
)
def test_accepted(settings: list[str]) -> None:
    load_config(None, settings)


def test_the_group_must_divide_the_ranks_of_a_stage() -> None:
    config = load_config(None, ["parallel.memory_parallel_size=4", "parallel.pipeline_parallel_size=2"])
    assert validate_world(config, 8) == 4
    with pytest.raises(ConfigError, match="memory_parallel_size = 4 does not divide the 2 ranks .* divisor of 2"):
        validate_world(config, 4)
