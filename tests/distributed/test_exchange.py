"""Exchanges over real ranks equal the lookup in whole tables: values, gradients, and the bytes of the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ultramem.memory.kinds import blocks, num_cores, pre_value_dim
from megatron_ultramem.memory.lookup import LocalLookup, lookup_backend, run_lookup
from megatron_ultramem.parallel.routing import RowOwners
from megatron_ultramem.parallel.traffic import Capacity, Widths, columns_bytes, rows_bytes, rows_to_all_bytes
from tests.distributed.exchange_job import Case, exchange_job, refused_exchange
from tests.distributed.workers import WorkerPool

FUSED = {"kernels": "fused"}  # on a CPU: the kernels' references
PLAIN_VALUES, EXPANDED = {"kind": "memory_plus"}, {"kind": "ultramem"}
RING = {"sharing": "ring", "share_size": 2, "num_keys": 6, "rows_multiple": 8}
CASES = {
    "rows": Case("rows", (6, 6)),
    "rows-uneven": Case("rows", (7, 3)),
    "rows-no-tokens-on-a-rank": Case("rows", (0, 5)),
    "rows-no-tokens-at-all": Case("rows", (0, 0)),
    "rows-all-tokens-hit-one-row": Case("rows", (9, 4), "one_row"),
    "rows-of-a-rank-never-hit": Case("rows", (4, 9), "first_half"),
    "rows-gelu": Case("rows", (6, 5), memory={"activation": "gelu"}),
    "rows-one-core": Case("rows", (3, 4), memory={"num_cores": 1}),
    "rows-window-of-a-pool": Case("rows", (6, 5), memory=RING, layers=4),
    "rows-4-ranks": Case("rows", (6, 1, 0, 9)),
    "rows-4-ranks-window": Case("rows", (6, 1, 0, 9), memory=RING, layers=4),
    "rows-fp32": Case("rows", (16, 16), dtype=torch.float32),
    "rows-bf16": Case("rows", (16, 11), dtype=torch.bfloat16),
    "rows-without-pre-values": Case("rows", (6, 5), memory=PLAIN_VALUES),
    "rows-gaps": Case("rows", (6, 5), "gaps", memory=EXPANDED),
    "rows-holes": Case("rows", (6, 5), "holes", memory=EXPANDED),
    "rows-static-gaps-overflow": Case("rows", (9, 8), "gaps", capacity=0.25, memory=EXPANDED),
    "rows-static": Case("rows", (6, 6), capacity=1.9),
    "rows-static-gaps-room-for-all": Case("rows", (9, 8), "gaps", capacity=2.0, memory=EXPANDED),
    "rows-to-all": Case("rows", (6, 6), capacity=2.0),
    "rows-to-all-uneven": Case("rows", (6, 1, 0, 9), capacity=4.0),
    "rows-to-all-window-of-a-pool": Case("rows", (6, 1, 0, 9), memory=RING, layers=4, capacity=9.0),
    "rows-to-all-gaps": Case("rows", (6, 5), "gaps", capacity=2.0),
    "rows-to-all-without-pre-values": Case("rows", (6, 5), memory=PLAIN_VALUES, capacity=2.0),
    "rows-to-all-bf16": Case("rows", (16, 16), capacity=2.0, dtype=torch.bfloat16),
    "rows-to-all-fused": Case("rows", (6, 1, 0, 9), memory=FUSED, capacity=4.0, dtype=torch.float32),
    "rows-static-overflow": Case("rows", (6, 6), capacity=0.5),
    "rows-to-all-one-row": Case("rows", (6, 4), "one_row", capacity=2.0),
    "rows-static-one-row": Case("rows", (6, 6), "one_row", capacity=1.0),
    "rows-static-uneven": Case("rows", (6, 2), capacity=1.0),
    "rows-static-no-tokens-on-a-rank": Case("rows", (6, 0), capacity=1.2),
    "rows-static-4-ranks-overflow": Case("rows", (6, 9, 0, 4), "first_half", capacity=0.7),
    "rows-static-bf16": Case("rows", (16, 16), capacity=1.1, dtype=torch.bfloat16),
    "columns": Case("columns", (6, 6)),
    "columns-uneven": Case("columns", (7, 3)),
    "columns-no-tokens-on-a-rank": Case("columns", (0, 5)),
    "columns-no-tokens-at-all": Case("columns", (0, 0)),
    "columns-all-tokens-hit-one-row": Case("columns", (9, 4), "one_row"),
    "columns-gelu": Case("columns", (6, 5), memory={"activation": "gelu"}),
    "columns-one-core": Case("columns", (3, 4), memory={"num_cores": 1}),
    "columns-4-ranks": Case("columns", (6, 1, 0, 9)),
    "columns-4-ranks-more-cores-than-ranks": Case("columns", (3, 4, 5, 2), memory={"num_cores": 8}),
    "columns-3-ranks-share-2-cores": Case("columns", (4, 2, 5), memory={"value_dim": 12, "pre_value_dim": 9}),
    "columns-without-pre-values": Case("columns", (6, 5), memory=PLAIN_VALUES),
    "columns-gaps": Case("columns", (6, 5), "gaps", memory=EXPANDED),
    "columns-holes": Case("columns", (6, 5), "holes", memory=EXPANDED),
    "columns-gaps-fused": Case("columns", (6, 5), "gaps", memory=FUSED | EXPANDED, dtype=torch.float32),
    "columns-fp32": Case("columns", (16, 16), dtype=torch.float32),
    "columns-bf16": Case("columns", (16, 11), dtype=torch.bfloat16),
    "rows-fused": Case("rows", (6, 1, 0, 9), memory=FUSED, dtype=torch.float32),
    "rows-static-overflow-fused": Case("rows", (6, 6), capacity=0.5, memory=FUSED, dtype=torch.float32),
    "columns-fused": Case("columns", (6, 1, 0, 9), memory=FUSED | {"activation": "gelu"}, dtype=torch.float32),
    "columns-3-ranks-share-2-cores-fused": Case(
        "columns", (4, 2, 5), memory=FUSED | {"value_dim": 12, "pre_value_dim": 9}, dtype=torch.float32
    ),
    "two_level-fused": Case("two_level", (6, 1, 0, 9), memory=FUSED, dtype=torch.float32),
    "two_level": Case("two_level", (6, 1, 0, 9)),
    "two_level-without-pre-values": Case("two_level", (6, 1, 0, 9), memory=PLAIN_VALUES),
    "two_level-gaps": Case("two_level", (6, 1, 0, 9), "gaps", memory=EXPANDED),
    "two_level-window": Case("two_level", (3, 3, 3, 3), memory=RING, layers=4),
    "two_level-to-all": Case("two_level", (6, 1, 0, 9), capacity=2.0),
    "two_level-to-all-without-pre-values": Case("two_level", (6, 1, 0, 9), memory=PLAIN_VALUES, capacity=2.0),
    "two_level-to-all-expanded": Case("two_level", (6, 1, 0, 9), "holes", capacity=2.0, memory=EXPANDED),
    "two_level-static-overflow": Case("two_level", (6, 5, 0, 4), "first_half", capacity=0.7),
}
# Payloads are rounded to bf16, like the tables; sums are not.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2}


def whole(case: Case) -> dict[str, Any]:
    """The same lookups on whole tables: per-rank results, and the tables' gradients summed over ranks."""
    tables = [torch.nn.Parameter(table.double()) for table in case.tables()]
    path = LocalLookup(lookup_backend("reference", torch.device("cpu")), case.config.activation, padded=True)
    found: dict[str, Any] = {"pooled": [], "scores": [], "pre_input": []}
    for rank in range(len(case.tokens)):
        indices, scores, pre_input, grad = (x if x.dtype == torch.int64 else x.double() for x in case.inputs(rank))
        scores.requires_grad_()
        pre_input.requires_grad_()
        pooled = run_lookup(path, indices, scores, pre_input, *tables)
        pooled.backward(grad)
        found["pooled"].append(pooled.detach())
        found["scores"].append(scores.grad)
        found["pre_input"].append(pre_input.grad)
    return found | {"tables": [table.grad for table in tables]}


@pytest.mark.parametrize("name", CASES)
def test_exchange_equals_the_lookup_in_whole_tables(pool: WorkerPool, name: str) -> None:
    case = CASES[name]
    assert_equals_whole(case, pool.run(len(case.tokens), exchange_job, case))


@pytest.mark.parametrize("memory", [{}, EXPANDED], ids=["rows-to-all", "static-slots"])
def test_more_tokens_than_there_is_room_for_are_refused(pool: WorkerPool, memory: dict[str, Any]) -> None:
    """Where nothing goes through a second round, those beyond would be lost."""
    case = Case("rows", (26, 26), capacity=2.0, memory=memory, room=4)
    room = 4 * blocks(case.config)
    for said in pool.run(2, refused_exchange, case):
        assert f"26 lookups of a rank in an exchange of memory values with room for {room};" in said


def assert_equals_whole(case: Case, results: list[dict[str, Any]]) -> None:
    """What the ranks found is what one lookup in whole tables gives, and every element of a table has one home."""
    expected = whole(case)
    for rank, result in enumerate(results):
        for what in ("pooled", "scores", "pre_input"):
            assert_close(result[what], expected[what][rank], case, f"{what} on rank {rank}")
        assert result["pooled"].dtype == result["pre_input"].dtype == case.dtype
        assert result["table_grads"] == [None, None] and result["untouched"]
    for number, gradient in enumerate(expected["tables"]):
        covered = torch.zeros(gradient.shape)
        for result in results:
            shard, local = result["shards"][number], result["tables"][number]
            columns = slice(shard.column_start, shard.column_start + shard.columns)
            for rows, (start, _) in shard.pieces():
                place = (slice(start, start + shard.block_rows), columns)
                assert_close(local[rows], gradient[place], case, f"gradient of table {number}")
                covered[place] += 1
        assert (covered == 1).all()  # every element has one home


def assert_close(actual: torch.Tensor, expected: torch.Tensor, case: Case, what: str) -> None:
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=TOLERANCE[case.dtype] * scale, msg=lambda text: f"{what}: {text}"
    )


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("columns")])
def test_bytes_of_columns_equal_the_formula(pool: WorkerPool, name: str) -> None:
    case, ranks = CASES[name], len(CASES[name].tokens)
    for rank, result in enumerate(pool.run(ranks, exchange_job, case)):
        assert result["bytes"] == columns_bytes(widths(case), ranks, rank, max(case.tokens))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("rows") and not CASES[name].capacity])
def test_bytes_of_rows_equal_the_formula(pool: WorkerPool, name: str) -> None:
    case, ranks = CASES[name], len(CASES[name].tokens)
    results = pool.run(ranks, exchange_job, case)
    shard = results[0]["shards"][0]
    demand = [demands(case, rank, RowOwners(ranks, shard.block_rows)) for rank in range(ranks)]
    for rank, result in enumerate(results):
        assert result["bytes"] == rows_bytes(widths(case), *counts(demand, rank, ranks))


def test_bytes_of_static_rows_equal_the_formula_for_the_capacity(pool: WorkerPool) -> None:
    case = Case("rows", (6, 6), capacity=1.5)
    queries, entries = Capacity(1.5, 6).slots(5, 2)
    assert (queries, entries) == (6, 23)
    for result in pool.run(2, exchange_job, case):
        expected = rows_bytes(widths(case), [queries], [entries], [queries], [entries], dynamic=False)
        assert result["bytes"] == expected


@pytest.mark.parametrize("name", ["rows-to-all", "rows-to-all-uneven", "rows-to-all-without-pre-values"])
def test_bytes_of_rows_to_all_equal_the_formula(pool: WorkerPool, name: str) -> None:
    case = CASES[name]
    for result in pool.run(len(case.tokens), exchange_job, case):
        assert result["bytes"] == rows_to_all_bytes(widths(case), len(case.tokens), max(case.tokens))
        assert result["messages"] == (2, 2)  # and nothing to agree on


STATIC_OVERFLOW = [name for name in CASES if name.startswith("rows-static") and "overflow" in name]


@pytest.mark.parametrize("name", [*STATIC_OVERFLOW, "rows-static-one-row"])
def test_bytes_of_the_second_round_equal_the_formula(pool: WorkerPool, name: str) -> None:
    """A round of static sizes, and one like those of dynamic sizes for what it left."""
    case, ranks = CASES[name], len(CASES[name].tokens)
    assert case.capacity is not None
    slots = Capacity(case.capacity, max(case.tokens), blocks(case.config)).slots(case.config.top_m, ranks)
    results = pool.run(ranks, exchange_job, case)
    owners = RowOwners(ranks, results[0]["shards"][0].block_rows)
    left = [demands(case, rank, owners, slots) for rank in range(ranks)]
    assert any(pair != (0, 0) for pairs in left for pair in pairs)
    queries, entries = ([number] * (ranks - 1) for number in slots)
    first = rows_bytes(widths(case), queries, entries, queries, entries, dynamic=False)
    for rank, result in enumerate(results):
        second = rows_bytes(widths(case), *counts(left, rank, ranks))
        assert result["bytes"] == (first[0] + second[0], first[1] + second[1])


@pytest.mark.parametrize("name", ["two_level-to-all", "two_level-to-all-without-pre-values"])
def test_bytes_of_two_levels_with_room_for_everything_equal_the_formulas(pool: WorkerPool, name: str) -> None:
    """Rows to the other node, and columns within for the queries of both; nothing to agree on."""
    case, w = CASES[name], widths(CASES[name])
    across = rows_to_all_bytes(w, 2, max(case.tokens))
    for rank, result in enumerate(pool.run(4, exchange_job, case)):
        within = columns_bytes(w, 2, rank % 2, 2 * max(case.tokens))
        assert result["bytes"] == (across[0] + within[0], across[1] + within[1])
        assert result["messages"] == ((6, 6) if w.pre_value_dim else (5, 4))


@pytest.mark.parametrize("name", ["two_level", "two_level-gaps", "two_level-window"])
def test_bytes_of_two_levels_equal_the_formulas(pool: WorkerPool, name: str) -> None:
    """Ranks 0 and 2 share rows, as 1 and 3 do; columns are for the most queries that came to a rank of the node."""
    case, w = CASES[name], widths(CASES[name])
    results = pool.run(4, exchange_job, case)
    owners = RowOwners(2, results[0]["shards"][0].block_rows)
    demand = [demands(case, rank, owners) for rank in range(4)]
    came = [sum(demand[other][rank // 2][0] for other in range(rank % 2, 4, 2)) for rank in range(4)]
    for rank, result in enumerate(results):
        across = rows_bytes(w, *counts(demand[rank % 2 :: 2], rank // 2, 2))
        node = rank // 2 * 2
        within = columns_bytes(w, 2, rank % 2, max(came[node : node + 2]))
        assert result["bytes"] == (across[0] + within[0], across[1] + within[1])


def widths(case: Case) -> Widths:
    c = case.config
    return Widths(c.top_m * c.num_heads, num_cores(c), c.value_dim, pre_value_dim(c), case.dtype.itemsize)


def demands(case: Case, rank: int, owners: RowOwners, slots: tuple[int, int] = (0, 0)) -> list[tuple[int, int]]:
    """(queries, entries) that a rank sends to every rank, counted one by one, of those that find no slot: tokens take
    theirs in turn, each for all of its entries, up to the first without."""
    asked, counted = [(0, 0)] * owners.ranks, [(0, 0)] * owners.ranks
    for row_of_token in case.inputs(rank)[0].tolist():
        wanted = [index // owners.block_rows % owners.ranks for index in row_of_token if index >= 0]
        for owner in set(wanted):
            queries, entries = asked[owner]
            asked[owner] = queries + 1, entries + wanted.count(owner)
            if asked[owner][0] > slots[0] or asked[owner][1] > slots[1]:
                queries, entries = counted[owner]
                counted[owner] = queries + 1, entries + wanted.count(owner)
    return counted


def counts(demand: list[list[tuple[int, int]]], rank: int, ranks: int) -> list[list[int]]:
    """What `rows_bytes` asks for, of what each rank sends to each."""
    others = [other for other in range(ranks) if other != rank]
    incoming = [demand[other][rank] for other in others]
    outgoing = [demand[rank][other] for other in others]
    return [[pair[i] for pair in pairs] for pairs in (incoming, outgoing) for i in (0, 1)]
