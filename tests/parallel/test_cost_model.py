"""Which placement the cost model takes, and what `ultramem plan` says of it."""

from __future__ import annotations

import pytest

from megatron_ultramem.cli import main
from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.parallel.cost_model import ROUTING_NS, choose, estimates

WIDE = ["model.memory.value_dim=768", "model.memory.pre_value_dim=768"]
FAST_MESSAGES = "parallel.exchange_latency_us=0"


def config(ranks: int, *settings: str) -> Config:
    return load_config(None, [f"parallel.memory_parallel_size={ranks}", *settings])


def test_one_rank_is_replicated() -> None:
    assert choose(config(1)).placement == "replicated"


def test_over_slow_links_columns_win_for_few_rows_a_token_and_rows_for_many() -> None:
    slow = [*WIDE, FAST_MESSAGES, "parallel.intra_node_gb_per_s=5", "parallel.inter_node_gb_per_s=5"]
    assert choose(config(8, *slow, "model.memory.top_m=32")).placement == "columns"
    assert choose(config(8, *slow, "model.memory.top_m=768")).placement == "rows"


def test_the_work_of_sending_rows_to_their_owners_counts() -> None:
    found = {estimate.placement: estimate for estimate in estimates(config(2, FAST_MESSAGES))}
    rows = 32 * 4096  # of a micro-batch
    assert found["rows"].routing_us == pytest.approx(rows * ROUTING_NS / 1e3)
    assert found["columns"].routing_us == 0
    # Over fast links rows receive fewer bytes and are slower all the same.
    many = {one.placement: one for one in estimates(config(8, *WIDE, "model.memory.top_m=768", FAST_MESSAGES))}
    assert many["rows"].microseconds < many["columns"].microseconds
    assert many["rows"].total_us > many["columns"].total_us


def test_latency_favours_the_exchange_with_fewer_messages() -> None:
    assert choose(config(2, FAST_MESSAGES)).placement == "columns"
    assert choose(config(2, "parallel.exchange_latency_us=1000")).placement == "rows"


def test_columns_under_the_minimum_width_are_avoided_though_faster() -> None:
    found = {estimate.placement: estimate for estimate in estimates(config(8, FAST_MESSAGES))}
    assert found["columns"].microseconds < found["rows"].microseconds
    assert "48 bytes wide" in found["columns"].problem
    assert choose(config(8, FAST_MESSAGES)).placement == "rows"


def test_a_placement_that_is_named_is_taken_with_its_problem() -> None:
    choice = choose(config(8, "parallel.memory_placement=columns"))
    assert choice.placement == "columns" and "48 bytes" in choice.problem


def test_slow_links_between_nodes_favour_two_levels() -> None:
    choice = choose(config(32, *WIDE, "parallel.inter_node_gb_per_s=5"))
    assert (choice.placement, choice.columns) == ("two_level", 8)
    within = choose(config(32, *WIDE, "parallel.ranks_per_node=32", "parallel.inter_node_gb_per_s=5"))
    assert within.placement in ("rows", "columns")


def test_time_is_latency_and_bytes_over_bandwidth() -> None:
    for estimate in estimates(config(2, FAST_MESSAGES, "parallel.intra_node_gb_per_s=100")):
        moved = estimate.forward_bytes + estimate.backward_bytes
        assert estimate.microseconds == pytest.approx(moved / 100e9 * 1e6)


def test_plan_prints_figures_and_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "parallel.memory_parallel_size=8", "model.memory.top_m=256"]) == 0
    said = capsys.readouterr().out
    assert "249 MB on a rank" in said and "48" in said
    assert "parallel.memory_placement = auto -> rows" in said


def test_plan_without_memory_layers_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model.memory.layers=none"]) == 0
    assert "nothing to place" in capsys.readouterr().out
