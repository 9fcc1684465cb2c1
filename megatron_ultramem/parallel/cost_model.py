"""Which placement of the value tables is fastest: an estimate from message sizes, bandwidths and latency, and from the
work of sending rows to their owners. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_ultramem.memory.geometry import plan_pools
from megatron_ultramem.memory.kinds import blocks, num_cores, pre_value_dim
from megatron_ultramem.parallel.traffic import (
    Capacity,
    Widths,
    columns_bytes,
    expected_queries,
    expected_rows_bytes,
    rows_bytes,
    rows_to_all_bytes,
)

if TYPE_CHECKING:  # the config package checks its settings with this module: importing it here would be a circle
    from megatron_ultramem.config.schema import Config

SECTOR_BYTES = 64  # narrower column shards waste what an H100 reads
# Messages of a forward and a backward; for rows the exchange of sizes (or of what is left over) and the host's wait
# for it count as two, and for columns within rows, to agree on the largest number of queries, as one more.
ROWS_MESSAGES, COLUMNS_MESSAGES, COLUMNS_MESSAGES_WITHOUT_DOTS = 6, 8, 5
ROWS_MESSAGES_WITHOUT_WAIT = 4  # with room for all rows
# Of the GPU for a row that a token wants, by rows: sorting by owner, packing, and the same back. A micro-batch of
# 524,288 rows a layer took 34 to 42 ms longer in 20 layers than without an exchange (memory_parallel_h200x2.json).
# Rows that go to all ranks are not sorted by owner; what they cost is not measured yet, and counts the same.
ROUTING_NS = 3.5


@dataclass(frozen=True)
class Estimate:
    """One placement of the pools of a model, per memory layer and micro-batch.

    Attributes:
        ranks: of the memory-parallel group.
        columns: of these, ranks that share the columns (1: none do).
        forward_bytes, backward_bytes: received by a rank from others.
        microseconds: of communication, forward and backward, if nothing else runs.
        messages: of a forward and a backward.
        queries: (token, owner) pairs that a token of the exchange by rows makes.
        static: sizes of that exchange are fixed by parallel.exchange_capacity.
        routing_us: microseconds of the GPU's work of that exchange beside its messages, forward and backward.
        problem: why it cannot or should not be used; '' if nothing is wrong.
    """

    placement: str
    ranks: int
    columns: int
    forward_bytes: int
    backward_bytes: int
    microseconds: float
    problem: str = ""
    messages: int = 0
    queries: float = 0.0
    static: bool = False
    routing_us: float = 0.0

    @property
    def total_us(self) -> float:
        return self.microseconds + self.routing_us


def tokens_per_rank(config: Config) -> int:
    """Tokens that a rank brings into a memory layer in one micro-batch."""
    p = config.parallel
    return (
        config.train.micro_batch_size
        * config.data.sequence_length
        // (p.tensor_parallel_size * p.context_parallel_size)
    )


def widths(config: Config) -> Widths:
    m = config.model.memory
    size = 2 if config.train.precision == "bf16" else 4
    return Widths(m.top_m * m.num_heads, num_cores(m), m.value_dim, pre_value_dim(m), size, blocks(m))


def two_level_columns(config: Config) -> int:
    """Ranks that share columns in the two-level placement."""
    p = config.parallel
    return p.memory_columns or min(p.ranks_per_node, p.memory_parallel_size)


def estimates(config: Config) -> list[Estimate]:
    """All placements for parallel.memory_parallel_size, with what is wrong with each."""
    p = config.parallel
    ranks, tokens, w = p.memory_parallel_size, tokens_per_rank(config), widths(config)
    if ranks == 1:
        return [Estimate("replicated", 1, 1, 0, 0, 0.0)]
    in_node = min(ranks, p.ranks_per_node)
    near = (in_node - 1) / (ranks - 1)  # share of what a rank receives that comes from its node

    def time(received: float, near: float, messages: int) -> float:
        # The two kinds of links work at the same time.
        links = max(near * received / p.intra_node_gb_per_s, (1 - near) * received / p.inter_node_gb_per_s)
        return messages * p.exchange_latency_us + links / 1e3

    columns = columns_bytes(w, ranks, 0, tokens)
    by_columns = COLUMNS_MESSAGES if w.pre_value_dim else COLUMNS_MESSAGES_WITHOUT_DOTS
    moved, queries = _by_rows(config, ranks)
    static = p.exchange_capacity is not None
    routing = tokens * w.top_m * ROUTING_NS / 1e3
    found = [
        Estimate(
            "rows",
            ranks,
            1,
            *moved,
            time(sum(moved), near, rows_messages(config, ranks)),
            _rows_problem(config, ranks),
            rows_messages(config, ranks),
            queries / tokens,
            static,
            routing,
        ),
        Estimate(
            "columns",
            ranks,
            ranks,
            *columns,
            time(sum(columns), near, by_columns),
            _columns_problem(config, ranks),
            by_columns,
        ),
    ]
    share = two_level_columns(config)
    if share < ranks and ranks % share == 0 and share > 1:
        nodes = ranks // share
        across, queries = _by_rows(config, nodes)
        # A rank gets as many queries as it makes.
        within = columns_bytes(replace(w, blocks=1), share, 0, round(queries))
        by_rows = rows_messages(config, nodes)
        in_columns = by_columns + (not rows_hold_all(config, nodes))
        total = time(sum(across), 0.0, by_rows) + time(sum(within), 1.0, in_columns)
        problem = _rows_problem(config, nodes) or _columns_problem(config, share)
        received = across[0] + within[0], across[1] + within[1]
        messages = by_rows + in_columns
        made = queries / tokens
        found.append(Estimate("two_level", ranks, share, *received, total, problem, messages, made, static, routing))
    return found


def rows_messages(config: Config, ranks: int) -> int:
    """Messages of the exchange by rows between `ranks`, forward and backward."""
    return ROWS_MESSAGES_WITHOUT_WAIT if rows_hold_all(config, ranks) else ROWS_MESSAGES


def rows_hold_all(config: Config, ranks: int) -> bool:
    """Whether parallel.exchange_capacity leaves nothing to a second round, and the host nothing to wait for."""
    factor = config.parallel.exchange_capacity
    return factor is not None and Capacity(factor, tokens_per_rank(config)).holds_all(ranks)


def _by_rows(config: Config, ranks: int) -> tuple[tuple[int, int], float]:
    """(bytes received forward and backward, queries that a rank makes) of the exchange by rows between `ranks`."""
    capacity, tokens, w = config.parallel.exchange_capacity, tokens_per_rank(config), widths(config)
    if capacity is None:
        made = ranks * expected_queries(ranks, w.blocks * tokens, w.top_m / w.blocks)
        return expected_rows_bytes(w, ranks, tokens), made
    static = Capacity(capacity, tokens, w.blocks)
    if static.to_all(ranks):
        return rows_to_all_bytes(w, ranks, tokens), float(ranks * tokens)
    slots = static.slots(w.top_m, ranks)
    queries, entries = ([number] * (ranks - 1) for number in slots)
    return rows_bytes(w, queries, entries, queries, entries, dynamic=False), float(ranks * slots[0])


def choose(config: Config) -> Estimate:
    """The placement that a run uses: what parallel.memory_placement names, or the fastest without a problem."""
    found, wanted = estimates(config), config.parallel.memory_placement
    if wanted == "auto":
        good = [estimate for estimate in found if not estimate.problem] or found
        return min(good, key=lambda estimate: estimate.total_us)
    return next(estimate for estimate in found if estimate.placement == wanted)


def shard_width(config: Config, columns: int) -> int:
    """Bytes of a row of the narrower table when `columns` ranks share the columns."""
    w = widths(config)
    return min(w.value_dim, w.pre_value_dim or w.value_dim) // columns * w.size


def _rows_problem(config: Config, ranks: int) -> str:
    odd = [pool for pool in plan_pools(config.model) if pool.padded_rows % ranks]
    if odd:
        return (
            f"{ranks} ranks do not divide the {odd[0].padded_rows} rows of a pool; legal: a divisor, or "
            f"model.memory.rows_multiple a multiple of {ranks} (another model)"
        )
    return ""


def _columns_problem(config: Config, ranks: int) -> str:
    w = widths(config)
    for name, width in (("value_dim", w.value_dim), ("pre_value_dim", w.pre_value_dim)):
        if width % ranks:
            return f"{ranks} ranks do not divide model.memory.{name} = {width}; legal: a divisor"
    bytes_wide = shard_width(config, ranks)
    if bytes_wide < SECTOR_BYTES:
        return f"column shards are {bytes_wide} bytes wide, under the {SECTOR_BYTES} that a GPU reads at once"
    return ""
