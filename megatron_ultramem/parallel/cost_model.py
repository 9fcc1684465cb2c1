"""Which placement of the value tables is fastest: an estimate from message sizes, bandwidths and latency, and from the
work of sending rows to their owners. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

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
ROUTING_NS = 3.5
# For a row number that a rank gets where all of them go to all ranks: the lookup passes over those of others. With 2.1
# million a layer, of two ranks, a micro-batch of 16 layers took 19 ms longer than by columns (scaling_h200x2.json).
PASSING_NS = 0.6


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
        legal: whether it can be.
    """

    placement: str
    ranks: int
    columns: int
    forward_bytes: int
    backward_bytes: int
    microseconds: float
    problem: str = ""
    legal: bool = True
    messages: int = 0
    queries: float = 0.0
    static: bool = False
    routing_us: float = 0.0

    @property
    def label(self) -> str:
        """With its sizes: two_level (2 x 4) has rows in 2 parts, each on 4 ranks that share columns."""
        if self.placement != "two_level":
            return self.placement
        return f"two_level ({self.ranks // self.columns} x {self.columns})"

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
    """Ranks that share columns where parallel.memory_placement is two_level."""
    p = config.parallel
    return p.memory_columns or min(p.ranks_per_node, p.memory_parallel_size)


def estimates(config: Config) -> list[Estimate]:
    """All placements for parallel.memory_parallel_size, with what is wrong with each; two_level with the number of
    columns that is best, unless two_level is what parallel.memory_placement names."""
    ranks = config.parallel.memory_parallel_size
    if ranks == 1:
        return [Estimate("replicated", 1, 1, 0, 0, 0.0)]
    two_level = [_two_level(config, columns) for columns in _column_counts(config)]
    return [_rows(config), _columns(config), *([min(two_level, key=_rank)] if two_level else [])]


def _column_counts(config: Config) -> list[int]:
    """Numbers of ranks that may share columns by two_level."""
    p = config.parallel
    named = p.memory_placement == "two_level"
    node = p.ranks_per_node
    counts = [two_level_columns(config)] if named else [size for size in range(2, node + 1) if node % size == 0]
    return [count for count in counts if splits(p.memory_parallel_size, count)]


def splits(ranks: int, columns: int) -> bool:
    """Whether `columns` ranks that share columns make two levels of so many."""
    return 1 < columns < ranks and ranks % columns == 0


def _rows(config: Config) -> Estimate:
    p = config.parallel
    ranks, tokens = p.memory_parallel_size, tokens_per_rank(config)
    moved, queries = _by_rows(config, ranks)
    messages = rows_messages(config, ranks)
    return Estimate(
        "rows",
        ranks,
        1,
        *moved,
        _microseconds(config, sum(moved), _near(ranks, p.ranks_per_node), messages),
        *_rows_verdict(config, ranks),
        messages,
        queries / tokens,
        p.exchange_capacity is not None,
        _routing_us(config, ranks),
    )


def _columns(config: Config) -> Estimate:
    p = config.parallel
    ranks = p.memory_parallel_size
    moved, messages = columns_bytes(widths(config), ranks, 0, tokens_per_rank(config)), _columns_messages(config)
    time = _microseconds(config, sum(moved), _near(ranks, p.ranks_per_node), messages)
    return Estimate("columns", ranks, ranks, *moved, time, *_columns_verdict(config, ranks), messages)


def _two_level(config: Config, columns: int) -> Estimate:
    """Rows among P / columns ranks, whose rows are shared by columns."""
    p, tokens = config.parallel, tokens_per_rank(config)
    owners = p.memory_parallel_size // columns
    across, queries = _by_rows(config, owners)
    # A rank gets as many queries as it makes.
    within = columns_bytes(replace(widths(config), blocks=1), columns, 0, round(queries))
    by_rows, by_columns = rows_messages(config, owners), _columns_messages(config) + (not rows_hold_all(config, owners))
    rows_verdict = _rows_verdict(config, owners)
    return Estimate(
        "two_level",
        p.memory_parallel_size,
        columns,
        across[0] + within[0],
        across[1] + within[1],
        _microseconds(config, sum(across), _near(owners, p.ranks_per_node // columns), by_rows)
        + _microseconds(config, sum(within), _near(columns, p.ranks_per_node), by_columns),
        *(_columns_verdict(config, columns) if rows_verdict.legal else rows_verdict),
        by_rows + by_columns,
        queries / tokens,
        p.exchange_capacity is not None,
        _routing_us(config, owners),
    )


def _microseconds(config: Config, received: float, near: float, messages: int) -> float:
    """Of so many messages with so many bytes, a share `near` of them from the same node."""
    p = config.parallel
    # The two kinds of links work at the same time.
    links = max(near * received / p.intra_node_gb_per_s, (1 - near) * received / p.inter_node_gb_per_s)
    return messages * p.exchange_latency_us + links / 1e3


def _near(ranks: int, in_node: int) -> float:
    """The share of what a rank receives from the others of a group that comes from its node, where `in_node` of the
    group are."""
    return (min(max(in_node, 1), ranks) - 1) / (ranks - 1)


def _columns_messages(config: Config) -> int:
    return COLUMNS_MESSAGES if pre_value_dim(config.model.memory) else COLUMNS_MESSAGES_WITHOUT_DOTS


def _routing_us(config: Config, ranks: int) -> float:
    """Of the exchange by rows between `ranks`, which each may share their rows with others by columns."""
    capacity = _capacity(config)
    to_all = capacity is not None and capacity.to_all(ranks)
    each = PASSING_NS * config.parallel.memory_parallel_size if to_all else ROUTING_NS
    return tokens_per_rank(config) * widths(config).top_m * each / 1e3


def rows_messages(config: Config, ranks: int) -> int:
    """Messages of the exchange by rows between `ranks`, forward and backward."""
    return ROWS_MESSAGES_WITHOUT_WAIT if rows_hold_all(config, ranks) else ROWS_MESSAGES


def rows_hold_all(config: Config, ranks: int) -> bool:
    """Whether parallel.exchange_capacity leaves nothing to a second round, and the host nothing to wait for."""
    capacity = _capacity(config)
    return capacity is not None and capacity.holds_all(ranks)


def _capacity(config: Config) -> Capacity | None:
    """Of the exchange by rows; None: sizes follow the rows."""
    factor = config.parallel.exchange_capacity
    return None if factor is None else Capacity(factor, tokens_per_rank(config), widths(config).blocks)


def _by_rows(config: Config, ranks: int) -> tuple[tuple[int, int], float]:
    """(bytes received forward and backward, queries that a rank makes) of the exchange by rows between `ranks`."""
    static, tokens, w = _capacity(config), tokens_per_rank(config), widths(config)
    if static is None:
        made = ranks * expected_queries(ranks, w.blocks * tokens, w.top_m / w.blocks)
        return expected_rows_bytes(w, ranks, tokens), made
    if static.to_all(ranks):
        return rows_to_all_bytes(w, ranks, tokens), float(ranks * tokens)
    slots = static.slots(w.top_m, ranks)
    queries, entries = ([number] * (ranks - 1) for number in slots)
    return rows_bytes(w, queries, entries, queries, entries, dynamic=False), float(ranks * slots[0])


def choose(config: Config) -> Estimate:
    """The placement that a run uses: what parallel.memory_placement names, or the best."""
    found, wanted = estimates(config), config.parallel.memory_placement
    if wanted != "auto":
        return next(estimate for estimate in found if estimate.placement == wanted)
    return min(found, key=_rank)


def _rank(estimate: Estimate) -> tuple[bool, bool, float]:
    """Legal ones first, then those without a problem, then the faster."""
    return not estimate.legal, bool(estimate.problem), estimate.total_us


def shard_width(config: Config, columns: int) -> int:
    """Bytes that a lookup reads of a row of the narrower table when `columns` ranks share the columns."""
    w, in_fp8 = widths(config), config.model.memory.table_read == "fp8"
    return min(w.value_dim, w.pre_value_dim or w.value_dim) // columns * (1 if in_fp8 else w.size)


class Verdict(NamedTuple):
    """What is wrong with a placement ('': nothing), and whether it can be used all the same."""

    problem: str = ""
    legal: bool = True


def _rows_verdict(config: Config, ranks: int) -> Verdict:
    odd = [pool for pool in plan_pools(config.model) if pool.padded_rows % ranks]
    if odd:
        return Verdict(
            f"{ranks} ranks do not divide the {odd[0].padded_rows} rows of a pool; legal: a divisor, or "
            f"model.memory.rows_multiple a multiple of {ranks} (another model)",
            legal=False,
        )
    return Verdict()


def _columns_verdict(config: Config, ranks: int) -> Verdict:
    w = widths(config)
    for name, width in (("value_dim", w.value_dim), ("pre_value_dim", w.pre_value_dim)):
        if width % ranks:
            return Verdict(f"{ranks} ranks do not divide model.memory.{name} = {width}; legal: a divisor", legal=False)
    bytes_wide = shard_width(config, ranks)
    if bytes_wide < SECTOR_BYTES:
        return Verdict(f"column shards are {bytes_wide} bytes wide, under the {SECTOR_BYTES} that a GPU reads at once")
    return Verdict()
