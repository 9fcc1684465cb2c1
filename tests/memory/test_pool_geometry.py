"""Pools, windows and the settings that contradict each other."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ultramem.config.schema import MemoryConfig, ModelConfig
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.memory.geometry import Pool, coarse_k, parse_layers, plan_pools


def pools_of(num_layers: int, **settings: Any) -> list[Pool]:
    memory = MemoryConfig(**{"num_keys": 4, "top_m": 2, **settings})
    return plan_pools(ModelConfig(num_layers=num_layers, memory=memory))


def visible_tables(pool: Pool, layer: int) -> list[int]:
    """Tables (from 1, as in the paper) that a layer's window covers, in the order of the window."""
    rows = [(v + pool.row_offset(layer)) % pool.rows for v in range(pool.virtual_rows)]
    return list(dict.fromkeys(row // pool.table_rows + 1 for row in rows))


@pytest.mark.parametrize(
    ("settings", "layer", "tables"),
    [
        ({"sharing": "ring"}, 1, [24, 1, 2, 3]),  # table 7 of the paper
        ({"sharing": "ring"}, 2, [1, 2, 3, 4]),
        ({"sharing": "ring"}, 23, [22, 23, 24, 1]),
        ({"sharing": "ring", "window": "start"}, 1, [1, 2, 3, 4]),  # released code
        ({"sharing": "ring", "window": "start"}, 23, [23, 24, 1, 2]),
        ({"sharing": "no_ring"}, 1, [1, 2, 3, 4]),
        ({"sharing": "no_ring"}, 10, [9, 10, 11, 12]),
        ({"sharing": "no_ring"}, 24, [21, 22, 23, 24]),
        ({"sharing": "no_ring", "window": "start"}, 10, [10, 11, 12, 13]),
        ({"sharing": "no_ring", "window": "start"}, 23, [21, 22, 23, 24]),
    ],
    ids=lambda value: str(value),
)
def test_window_of_four_in_24_layers(settings: dict[str, str], layer: int, tables: list[int]) -> None:
    (pool,) = pools_of(24, share_size=4, **settings)
    assert visible_tables(pool, layer - 1) == tables


def test_ring_of_nine_is_centred_on_the_own_table() -> None:
    (pool,) = pools_of(24, share_size=9, sharing="ring")
    assert visible_tables(pool, 9) == [6, 7, 8, 9, 10, 11, 12, 13, 14]


def test_blocks_are_consecutive_groups_that_all_their_layers_see() -> None:
    first, second = pools_of(8, share_size=4, sharing="block")
    assert (first.index, first.layers, second.index, second.layers) == (0, (0, 1, 2, 3), 1, (4, 5, 6, 7))
    assert all(visible_tables(second, layer) == [1, 2, 3, 4] for layer in second.layers)


def test_unshared_layers_see_their_own_table_alone() -> None:
    pools = pools_of(3)
    assert [pool.layers for pool in pools] == [(0,), (1,), (2,)]
    (pool,) = pools_of(3, pool_size=3)
    assert [visible_tables(pool, layer) for layer in range(3)] == [[1], [2], [3]]


def test_pools_group_memory_layers_not_all_layers() -> None:
    first, second = pools_of(12, layers="1,3,5-6,9,11", sharing="ring", share_size=2, pool_size=3)
    assert first.layers == (1, 3, 5) and second.layers == (6, 9, 11)
    assert visible_tables(second, 11) == [3, 1]


def test_no_memory_layers_need_no_pool() -> None:
    assert pools_of(4, layers="none") == []


def test_227m_has_the_published_number_of_table_parameters() -> None:
    memory = MemoryConfig(sharing="ring", share_size=10)
    (pool,) = plan_pools(ModelConfig(num_layers=20, memory=memory))
    assert pool.keys_per_side == 1138
    assert pool.virtual_rows == 1138**2
    assert pool.rows * (memory.value_dim + memory.pre_value_dim) == 995_328_000


def test_keys_per_side_are_exact_where_floating_point_is_not() -> None:
    n, y = 93222358, 131836323  # 2*n*n = y*y - 1, which floating point rounds to y*y
    (pool,) = plan_pools(ModelConfig(num_layers=2, memory=MemoryConfig(num_keys=n, sharing="block", share_size=2)))
    assert pool.keys_per_side == y - 1


def test_rows_are_padded_to_the_multiple() -> None:
    (pool,) = pools_of(1, num_keys=5, rows_multiple=16)
    assert (pool.rows, pool.padded_rows) == (25, 32)


@pytest.mark.parametrize(("top_m", "cap", "k"), [(32, None, 32), (32, 8, 8), (32, 64, 32), (200, None, 100)])
def test_coarse_k_is_the_smallest_of_keys_m_and_cap(top_m: int, cap: int | None, k: int) -> None:
    assert coarse_k(MemoryConfig(top_m=top_m, coarse_top_k=cap), 100) == k


@pytest.mark.parametrize(
    ("spec", "layers"), [("all", [0, 1, 2, 3, 4, 5]), ("none", []), ("0, 2,4-5", [0, 2, 4, 5]), ("3,1-3", [1, 2, 3])]
)
def test_layer_lists(spec: str, layers: list[int]) -> None:
    assert parse_layers(spec, 6, "model.memory.layers") == layers


@pytest.mark.parametrize("spec", ["", "6", "1-6", "4-2", "a", "1,,2", "-1", "1-", "²"])
def test_bad_layer_lists_are_refused_with_setting_value_and_legal_values(spec: str) -> None:
    with pytest.raises(ConfigError, match="numbers from 0 to 5") as caught:
        parse_layers(spec, 6, "model.memory.layers")
    assert f"model.memory.layers={spec!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sharing": "none", "share_size": 2}, r"share_size=2 .*legal: share_size=1"),
        ({"sharing": "ring", "share_size": 5, "pool_size": 4}, r"share_size=5 .*pool_size=4.*legal: 1 to 4"),
        ({"sharing": "ring", "share_size": 9}, r"share_size=9 .*pool_size=null.*legal: 1 to 8"),
        ({"sharing": "ring", "share_size": 2, "pool_size": 3}, r"pool_size=3 .*8 memory layers.*legal: 2, 4, 8"),
        ({"sharing": "block", "share_size": 3}, r"share_size=3 .*8 memory layers.*legal: 1, 2, 4, 8"),
        ({"sharing": "block", "share_size": 2, "pool_size": 4}, r"pool_size=4 .*sharing=block.*share_size \(2\)"),
        ({"top_m": 17}, r"top_m=17 .*16 rows.*legal: 1 to 16"),
        ({"top_m": 5, "coarse_top_k": 2}, r"top_m=5 .*2\*2 .*coarse_top_k=2.*at least 3"),
        ({"value_dim": 9}, r"value_dim=9 .*num_cores=2 .*multiple of 2"),
        ({"tucker_rank": 1, "tucker_penalty_coeff": 0.1}, r"tucker_penalty_coeff=0.1 .*tucker_rank=1.*legal"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_contradicting_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pools_of(8, **settings)
