"""Which placement the cost model takes, and what `ultramem plan` says of it."""

from __future__ import annotations

import pytest

from megatron_ultramem.cli import main
from megatron_ultramem.config import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.parallel.cost_model import PASSING_NS, ROUTING_NS, choose, estimates, shard_width

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


def test_rows_that_all_ranks_get_are_passed_over_but_not_sent_to_their_owners() -> None:
    def routing_us(ranks: int, placement: str, *settings: str) -> float:
        placed = f"parallel.memory_placement={placement}"
        return choose(config(ranks, FAST_MESSAGES, "parallel.exchange_capacity=1e9", placed, *settings)).routing_us

    rows = 32 * 4096
    assert routing_us(2, "rows") == pytest.approx(2 * rows * PASSING_NS / 1e3)
    # Each of the two that own a row gets the rows of the four that share them.
    assert routing_us(8, "two_level", "parallel.memory_columns=4") == pytest.approx(8 * rows * PASSING_NS / 1e3)
    # Where lookups share a token's rows, a rank sends each to its owner.
    shared = routing_us(2, "rows", "model.memory.kind=ultramem")
    assert shared == pytest.approx(rows * ROUTING_NS / 1e3)


def test_latency_favours_the_exchange_with_fewer_messages() -> None:
    assert choose(config(2, FAST_MESSAGES)).placement == "columns"
    assert choose(config(2, "parallel.exchange_latency_us=1000")).placement == "rows"


def test_columns_under_the_minimum_width_are_avoided_though_faster() -> None:
    found = {estimate.placement: estimate for estimate in estimates(config(8, FAST_MESSAGES))}
    assert found["columns"].microseconds < found["rows"].microseconds
    assert "48 bytes wide" in found["columns"].problem
    chosen = choose(config(8, FAST_MESSAGES))
    assert chosen.placement != "columns" and not chosen.problem


def test_a_placement_that_is_named_is_taken_with_its_problem() -> None:
    choice = choose(config(8, "parallel.memory_placement=columns"))
    assert choice.placement == "columns" and "48 bytes" in choice.problem


def test_slow_links_between_nodes_favour_two_levels() -> None:
    choice = choose(config(32, *WIDE, "parallel.inter_node_gb_per_s=5"))
    assert (choice.placement, choice.columns) == ("two_level", 8)


def test_links_between_nodes_do_not_count_within_one() -> None:
    times = [
        [one.microseconds for one in estimates(config(8, *WIDE, f"parallel.inter_node_gb_per_s={speed}"))]
        for speed in (5, 500)
    ]
    assert len(times[0]) == 3 and times[0] == times[1]


@pytest.mark.parametrize("ranks", [16, 32, 64])
def test_two_levels_share_columns_of_a_part_of_a_node_where_a_whole_one_makes_them_narrow(ranks: int) -> None:
    whole = choose(config(ranks, "parallel.memory_placement=two_level"))
    assert whole.columns == 8 and "48 bytes wide" in whole.problem
    chosen = choose(config(ranks))
    assert (chosen.placement, chosen.columns, chosen.problem) == ("two_level", 4, "")
    assert chosen.total_us < next(one.total_us for one in estimates(config(ranks)) if one.placement == "rows")


def test_more_columns_keep_more_of_the_traffic_within_a_node() -> None:
    found = {
        columns: choose(config(16, "parallel.memory_placement=two_level", f"parallel.memory_columns={columns}", *WIDE))
        for columns in (2, 4, 8)
    }
    assert found[8].total_us < found[4].total_us < found[2].total_us
    best = next(one for one in estimates(config(16, *WIDE)) if one.placement == "two_level")
    assert best.columns == 8


def test_what_is_legal_comes_before_what_is_not_however_fast() -> None:
    settings = ["parallel.intra_node_gb_per_s=5", "model.memory.top_m=256"]
    found = {one.placement: one for one in estimates(config(12, *settings))}
    assert found["rows"].total_us < found["columns"].total_us and not found["rows"].legal
    chosen = choose(config(12, *settings))
    assert chosen.placement == "columns" and chosen.legal and "32 bytes wide" in chosen.problem


@pytest.mark.parametrize(("table_read", "width"), [("params", 96), ("fp8", 48)])
def test_the_width_of_a_shard_is_what_lookups_read(table_read: str, width: int) -> None:
    four = config(4, f"model.memory.table_read={table_read}")
    (columns,) = (one for one in estimates(four) if one.placement == "columns")
    assert shard_width(four, 4) == width
    assert columns.problem == ("" if width >= 64 else f"column shards are {width} bytes wide, under the 64 that a GPU "
                               "reads at once")  # fmt: skip


def test_time_is_latency_and_bytes_over_bandwidth() -> None:
    for estimate in estimates(config(2, FAST_MESSAGES, "parallel.intra_node_gb_per_s=100")):
        moved = estimate.forward_bytes + estimate.backward_bytes
        assert estimate.microseconds == pytest.approx(moved / 100e9 * 1e6)


def test_plan_prints_figures_and_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "parallel.memory_parallel_size=8", "model.memory.top_m=256"]) == 0
    said = capsys.readouterr().out
    assert "249 MB on a rank" in said and "48" in said
    assert "parallel.memory_placement = auto -> rows" in said


def test_plan_names_the_columns_of_two_levels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "parallel.memory_parallel_size=16", "train.global_batch_size=16"]) == 0
    assert "parallel.memory_placement = auto -> two_level (4 x 4)" in capsys.readouterr().out


def test_plan_says_where_no_placement_is_without_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "parallel.memory_parallel_size=12", "train.global_batch_size=12"]) == 0
    assert "auto -> columns (none is without a problem: the fastest legal one)" in capsys.readouterr().out


def test_plan_without_memory_layers_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model.memory.layers=none"]) == 0
    assert "nothing to place" in capsys.readouterr().out
