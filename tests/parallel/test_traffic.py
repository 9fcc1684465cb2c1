"""The formulas of the exchanges' bytes against the reference's figures, and against properties they must have."""

from __future__ import annotations

import pytest

from megatron_ultramem.parallel.traffic import (
    Traffic,
    Widths,
    columns_bytes,
    core_range,
    expected_queries,
    expected_rows_bytes,
)

TOKENS = 4096


def widths(top_m: int, num_cores: int = 2) -> Widths:
    return Widths(top_m, num_cores, value_dim=192, pre_value_dim=192, size=2)


def test_figures_of_the_reference_at_8_ranks() -> None:
    """2.5 KB a token forward by columns against 5.4 by rows at m = 32; 14 KB and more against about 8 at m = 256."""
    columns, rows = columns_bytes(widths(32), 8, 0, TOKENS)[0], expected_rows_bytes(widths(32), 8, TOKENS)[0]
    assert columns / TOKENS == pytest.approx(8 * 32 * 7 + 2 * 384 * 7 / 8)
    assert rows / TOKENS == pytest.approx(5400, rel=0.05)
    columns, rows = columns_bytes(widths(256), 8, 0, TOKENS)[0], expected_rows_bytes(widths(256), 8, TOKENS)[0]
    assert columns / TOKENS > 14_000
    assert 7000 < rows / TOKENS < 8000  # entries take 8 bytes here, 10 in the reference


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
@pytest.mark.parametrize("num_cores", [1, 2, 4])
def test_cores_of_all_ranks_cover_every_column(ranks: int, num_cores: int) -> None:
    for rank in range(ranks):
        low, high = core_range(rank, ranks, 192, num_cores)
        held = {column // (192 // num_cores) for column in range(rank * 192 // ranks, (rank + 1) * 192 // ranks)}
        assert held == set(range(low, high))


def test_expected_queries_are_those_of_random_rows() -> None:
    assert expected_queries(4, 100, 1) == pytest.approx(25)
    assert expected_queries(2, 100, 2) == pytest.approx(75)
    assert expected_queries(2, 100, 32) == pytest.approx(100)


def test_one_rank_receives_nothing() -> None:
    assert columns_bytes(widths(32), 1, 0, TOKENS) == (0, 0)
    assert expected_rows_bytes(widths(32), 1, TOKENS) == (0, 0)


def test_the_counter_adds_up_by_direction_and_can_start_anew() -> None:
    traffic = Traffic()
    traffic.add("forward", 10)
    traffic.add("forward", 5)
    traffic.add("backward", 7)
    assert traffic.received == {"forward": 15, "backward": 7} and traffic.messages == {"forward": 2, "backward": 1}
    traffic.reset()
    assert traffic.received == traffic.messages == {"forward": 0, "backward": 0}
