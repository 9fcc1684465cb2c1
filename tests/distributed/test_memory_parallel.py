"""Training with value tables sharded over ranks equals training on one rank, under every placement and layout."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import TokenizerConfig
from megatron_ultramem.model.build import value_pools
from megatron_ultramem.parallel.cost_model import choose, tokens_per_rank, widths
from megatron_ultramem.parallel.placement import ShardedPlacement
from megatron_ultramem.parallel.traffic import columns_bytes, expected_rows_bytes
from megatron_ultramem.training.loop import train_step
from megatron_ultramem.training.preprocess import preprocess
from megatron_ultramem.training.setup import set_up
from tests.distributed.layout_job import STEPS, assemble, assert_trains_like, train_job
from tests.distributed.workers import WorkerPool

P2, P4 = "parallel.memory_parallel_size=2", "parallel.memory_parallel_size=4"
ROWS, COLUMNS = "parallel.memory_placement=rows", "parallel.memory_placement=columns"
TWO_LEVEL = [P4, "parallel.memory_placement=two_level", "parallel.memory_columns=2"]
TP2, PP2, EP2 = (f"parallel.{name}_parallel_size=2" for name in ("tensor", "pipeline", "expert"))
PLAIN = "parallel.distributed_optimizer=false"
INTERLEAVED = [PP2, "parallel.virtual_pipeline_stages=2", "parallel.overlap_p2p=true"]
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "parallel.bucket_size=20000"]
STATIC = "parallel.exchange_capacity"

MODELS = {
    "block": ["model.memory.sharing=block", "model.memory.share_size=2"],
    "ring": ["model.memory.sharing=ring", "model.memory.share_size=2", "model.memory.pool_size=4"],
    "no_ring": [
        "model.memory.sharing=no_ring",
        "model.memory.share_size=2",
        "model.memory.pool_size=4",
        "model.memory.balance_loss_coeff=0.01",
        "model.memory.activation=gelu",
        "data.mask_eod_loss=true",
    ],
    "deep_block": ["model.num_layers=8", "model.memory.sharing=block", "model.memory.share_size=2"],
    "moe": [
        "model.memory.layers=1-3",
        "model.moe.layers=2-3",
        "model.moe.num_experts=4",
        "model.moe.top_k=2",
        "model.moe.ffn_hidden_size=32",
        "model.moe.aux_loss_coeff=0",
    ],
}
# (model, layout): ranks, settings. The fast selection has every placement, kind of sharing and parallel dimension.
FAST = {
    ("block", "rows_p2"): (2, [P2, ROWS]),
    ("block", "columns_p2"): (2, [P2, COLUMNS]),
    ("ring", "rows_p4_recompute"): (4, [P4, ROWS, "train.recompute=full"]),
    ("no_ring", "columns_p4_memory_recompute"): (4, [P4, COLUMNS, "model.memory.recompute=true"]),
    ("ring", "rows_tp2"): (2, [P2, ROWS, TP2]),
    ("no_ring", "columns_tp2"): (2, [P2, COLUMNS, TP2]),
    ("block", "rows_pp2"): (4, [P2, ROWS, PP2]),
    ("block", "columns_dp2_plain_optimizer"): (4, [P2, COLUMNS, PLAIN]),
    ("ring", "rows_dp2_overlap"): (4, [P2, ROWS, *OVERLAP]),
    ("moe", "rows_ep2"): (2, [P2, ROWS, EP2]),
    ("ring", "two_level"): (4, TWO_LEVEL),
    ("ring", "rows_static_overflow"): (2, [P2, ROWS, f"{STATIC}=0.8"]),
    ("no_ring", "rows_to_all_tp2"): (4, [P4, ROWS, TP2, f"{STATIC}=4"]),
}
SLOW = {
    ("ring", "rows_p2"): (2, [P2, ROWS]),
    ("no_ring", "rows_p2"): (2, [P2, ROWS]),
    ("ring", "columns_p2"): (2, [P2, COLUMNS]),
    ("block", "rows_p4"): (4, [P4, ROWS]),
    ("block", "columns_p4"): (4, [P4, COLUMNS]),
    ("no_ring", "rows_p4"): (4, [P4, ROWS]),
    ("block", "rows_p2_plain_optimizer"): (2, [P2, ROWS, PLAIN]),
    ("block", "columns_p2_overlap"): (2, [P2, COLUMNS, *OVERLAP]),
    ("no_ring", "rows_tp2"): (2, [P2, ROWS, TP2]),
    ("block", "rows_tp2_plain_optimizer"): (2, [P2, ROWS, TP2, PLAIN]),
    ("ring", "columns_tp2_p4"): (4, [P4, COLUMNS, TP2]),
    ("ring", "rows_tp2_dp2"): (4, [P2, ROWS, TP2]),
    ("block", "columns_pp2"): (4, [P2, COLUMNS, PP2]),
    ("block", "rows_pp2_overlap"): (4, [P2, ROWS, PP2, *OVERLAP]),
    ("block", "rows_tp2_pp2"): (4, [P2, ROWS, TP2, PP2]),
    ("deep_block", "rows_pp2_interleaved"): (4, [P2, ROWS, *INTERLEAVED]),
    ("deep_block", "columns_pp2_interleaved"): (4, [P2, COLUMNS, *INTERLEAVED]),
    ("block", "rows_dp2"): (4, [P2, ROWS]),
    ("ring", "columns_dp2"): (4, [P2, COLUMNS]),
    ("moe", "columns_ep2"): (2, [P2, COLUMNS, EP2]),
    ("moe", "rows_ep2_tp2"): (2, [P2, ROWS, EP2, TP2]),
    ("moe", "rows_ep2_dp2_plain_optimizer"): (4, [P2, ROWS, EP2, PLAIN]),
    ("ring", "rows_p2_memory_recompute"): (2, [P2, ROWS, "model.memory.recompute=true"]),
    ("block", "columns_p2_recompute"): (2, [P2, COLUMNS, "train.recompute=full"]),
    ("block", "auto"): (2, [P2]),
    ("block", "two_level_static"): (4, [*TWO_LEVEL, f"{STATIC}=1.2"]),
    ("ring", "rows_static"): (2, [P2, ROWS, f"{STATIC}=1.9"]),
    ("ring", "rows_to_all_recompute"): (2, [P2, ROWS, f"{STATIC}=3.0", "train.recompute=full"]),
    ("block", "two_level_to_all"): (4, [*TWO_LEVEL, f"{STATIC}=2"]),
    ("block", "rows_p2_micro_batch_2"): (2, [P2, ROWS, "train.micro_batch_size=2"]),
}
CASES = [pytest.param(*case, *layout, id="-".join(case)) for case, layout in FAST.items()]
CASES += [pytest.param(*case, *layout, id="-".join(case), marks=pytest.mark.slow) for case, layout in SLOW.items()]


@pytest.mark.parametrize(("model", "layout", "ranks", "settings"), CASES)
def test_training_equals_one_rank(
    pool: WorkerPool,
    small_run: list[str],
    one_rank: Callable[[list[str]], dict],
    model: str,
    layout: str,
    ranks: int,
    settings: list[str],
) -> None:
    expected = one_rank(MODELS[model])
    results = pool.run(ranks, train_job, small_run + MODELS[model] + settings, STEPS, True)
    assert_trains_like(expected, results)


@pytest.fixture(scope="session")
def one_byte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a data set that is one byte again and again."""
    folder = tmp_path_factory.mktemp("one_byte")
    files = [folder / f"{number}.txt" for number in range(2)]
    for file in files:
        file.write_text("a" * 20_000)
    preprocess(files, folder / "data", TokenizerConfig())
    return folder / "data"


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        pytest.param([P2], [], id="p2"),
        pytest.param([P4], [PLAIN], id="p4_plain_optimizer"),
        pytest.param([P2], [PLAIN], id="p2_plain_optimizer", marks=pytest.mark.slow),
        pytest.param([P4], [], id="p4", marks=pytest.mark.slow),
    ],
)
def test_training_equals_one_rank_where_all_tokens_hit_one_row(
    pool: WorkerPool,
    small_run: list[str],
    one_rank: Callable[[list[str]], dict],
    one_byte: Path,
    layout: list[str],
    optimizer: list[str],
) -> None:
    """In every pool, so that the rows of all ranks but one are never hit."""
    model = ["model.memory.top_m=1", f"data.paths=[{one_byte}]", "data.split='50,50,0'"]
    expected = one_rank(model)
    ranks = int(layout[0][-1])
    results = pool.run(ranks, train_job, [*small_run, *model, *layout, ROWS, *optimizer], STEPS, True)
    for key, gradient in assemble([expected["grads"]]).items():
        if "pools" in key:
            assert np.count_nonzero(np.abs(gradient).max(1)) == 1, key
            touched = [
                np.abs(numbers).max() > 0 for rank in results for name, _, _, numbers in rank["grads"] if name == key
            ]
            assert sorted(touched) == [*[False] * (ranks - 1), True], key
    assert_trains_like(expected, results)


def step_traffic(overrides: list[str]) -> dict[str, Any]:
    """What the exchanges of one training step move on this rank, what the planner expects, and the warnings."""
    config = load_config(None, overrides)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = set_up(config)
    placement = value_pools(run.model)[0].placement
    assert isinstance(placement, ShardedPlacement)
    train_step(run)
    rank, ranks = dist.get_rank(), config.parallel.memory_parallel_size
    return {
        "received": tuple(placement.traffic.received.values()),
        "columns": columns_bytes(widths(config), ranks, rank, tokens_per_rank(config)),
        "rows": expected_rows_bytes(widths(config), ranks, tokens_per_rank(config)),
        "warnings": [str(warning.message) for warning in caught if "memory_placement" in str(warning.message)],
    }


LOOKUPS = 4 * 8 // 2  # layers x samples of a rank in a step


def groups_of_auto(overrides: list[str]) -> tuple[int, int]:
    """Ranks that share rows and columns."""
    placement = value_pools(set_up(load_config(None, overrides)).model)[0].placement
    assert isinstance(placement, ShardedPlacement) and placement.across is not None and placement.within is not None
    return placement.across.size(), placement.within.size()


def test_ranks_share_as_many_columns_as_auto_chose(pool: WorkerPool, small_run: list[str]) -> None:
    wide = ["model.memory.value_dim=32", "model.memory.pre_value_dim=32"]  # by columns of four narrow, of two not
    links = ["parallel.ranks_per_node=4", "parallel.exchange_latency_us=0", "parallel.intra_node_gb_per_s=0.01"]
    settings = [*small_run, *MODELS["block"], *wide, P4, *links]
    chosen = choose(load_config(None, settings))
    assert (chosen.placement, chosen.columns) == ("two_level", 2)
    assert pool.run(4, groups_of_auto, settings) == [(2, 2)] * 4


def test_a_step_moves_by_columns_what_the_planner_says(pool: WorkerPool, small_run: list[str]) -> None:
    for result in pool.run(2, step_traffic, [*small_run, *MODELS["ring"], P2, COLUMNS]):
        assert result["received"] == tuple(LOOKUPS * moved for moved in result["columns"])


def test_a_step_moves_by_rows_about_what_the_planner_says(pool: WorkerPool, small_run: list[str]) -> None:
    for result in pool.run(2, step_traffic, [*small_run, *MODELS["ring"], P2, ROWS]):
        for moved, expected in zip(result["received"], result["rows"], strict=True):
            assert moved == pytest.approx(LOOKUPS * expected, rel=0.1)  # the planner takes rows as evenly used


def test_narrow_columns_are_warned_of_with_the_figure_by_rank_0(pool: WorkerPool, small_run: list[str]) -> None:
    first, *others = pool.run(2, step_traffic, [*small_run, *MODELS["block"], P2, COLUMNS])
    assert first["warnings"] == [
        "parallel.memory_placement = columns: column shards are 24 bytes wide, under the 64 that a GPU reads at once"
    ]
    assert not any(result["warnings"] for result in others)
