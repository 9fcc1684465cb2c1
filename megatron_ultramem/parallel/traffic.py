"""Bytes that the exchanges move: a counter, and the formulas that it must agree with and that the planner uses.

All figures are bytes RECEIVED by one rank from the others, for one lookup; what a rank keeps for itself is not moved.

Legend: P ranks, T tokens a rank, M rows a token, C cores, Dv and Dp widths of values and pre-values, `size` bytes of a
parameter (2 for bf16). Row numbers and counts take 4 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

ALIGNMENT = 8  # of the part for one rank in a message of several arrays


@dataclass
class Traffic:
    """Counts bytes and messages by direction, 'forward' or 'backward'; `timed` is entered around each message."""

    received: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})
    messages: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})
    timed: Callable[[], AbstractContextManager[None]] = nullcontext

    def add(self, direction: str, received: int) -> None:
        self.received[direction] += received
        self.messages[direction] += 1

    def reset(self) -> None:
        self.set(Traffic())

    def copy(self) -> Traffic:
        return Traffic(dict(self.received), dict(self.messages))

    def set(self, other: Traffic) -> None:
        """Takes over the counts of another."""
        self.received, self.messages = dict(other.received), dict(other.messages)

    def __sub__(self, other: Traffic) -> Traffic:
        return self._combined(other, -1)

    def __iadd__(self, other: Traffic) -> Traffic:
        self.set(self._combined(other, 1))
        return self

    def _combined(self, other: Traffic, sign: int) -> Traffic:
        return Traffic(
            {direction: count + sign * other.received[direction] for direction, count in self.received.items()},
            {direction: count + sign * other.messages[direction] for direction, count in self.messages.items()},
        )


@dataclass(frozen=True)
class Widths:
    """What of the model enters the formulas."""

    top_m: int  # rows a token, of all heads
    num_cores: int
    value_dim: int
    pre_value_dim: int  # 0: without pre-values
    size: int
    blocks: int = 1  # lookups of a token, which share its rows and have a result each (UltraMem's value expansion)


@dataclass(frozen=True)
class Capacity:
    """Static sizes of the exchange by rows: room for `factor` times an even share of the entries of `tokens` tokens
    (the largest number that a rank has), the same on all ranks. `blocks`: lookups that share the rows of a token."""

    factor: float
    tokens: int
    blocks: int = 1

    @property
    def lookups(self) -> int:
        """Of a rank, at most."""
        return self.blocks * self.tokens

    def holds_all(self, ranks: int) -> bool:
        """Whether nothing can be left over, even if one rank owns every row that is wanted."""
        return self.factor >= ranks

    def to_all(self, ranks: int) -> bool:
        """Whether tokens go to all ranks as they are. Not where lookups share a token's rows: each has room for all."""
        return self.holds_all(ranks) and self.blocks == 1

    def slots(self, top_m: int, ranks: int) -> tuple[int, int]:
        """(queries, entries) for every pair of ranks."""
        entries = min(self.tokens * top_m, math.ceil(self.factor * self.tokens * top_m / ranks))
        return min(self.lookups, entries), entries


def align(count: int) -> int:
    """`count` bytes rounded up to the alignment of message parts."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def core_range(rank: int, ranks: int, value_dim: int, num_cores: int) -> tuple[int, int]:
    """Cores [low, high) whose slices meet the columns of `rank` when `ranks` split Dv evenly."""
    columns, width = value_dim // ranks, value_dim // num_cores
    return rank * columns // width, -(-(rank + 1) * columns // width)


def columns_bytes(widths: Widths, ranks: int, rank: int, tokens: int) -> tuple[int, int]:
    """(forward, backward) of the exchange by columns; every rank has `tokens` tokens (after padding to the largest).

    forward: row numbers and pre-inputs, partial dots, weights for the cores at hand, pooled slices;
    backward: gradients of the pooled slices, of the weights, of the dots, and of the pre-inputs.
    """
    w, others, T = widths, ranks - 1, tokens * widths.blocks
    low, high = core_range(rank, ranks, w.value_dim, w.num_cores)
    values, pre_values = w.value_dim // ranks, w.pre_value_dim // ranks
    dots = T * w.size * w.top_m if w.pre_value_dim else 0
    forward = others * (
        align(T * (4 * w.top_m + w.size * pre_values))
        + dots
        + T * w.size * w.top_m * (high - low)
        + T * w.size * values
    )
    cores_of_others = 0
    for other in range(ranks):
        other_low, other_high = core_range(other, ranks, w.value_dim, w.num_cores)
        cores_of_others += (other_high - other_low) * (other != rank)
    backward = others * (T * w.size * values + dots + T * w.size * pre_values)
    return forward, backward + T * w.size * w.top_m * cores_of_others


def rows_bytes(
    widths: Widths,
    queries_in: Sequence[int],
    entries_in: Sequence[int],
    queries_out: Sequence[int],
    entries_out: Sequence[int],
    *,
    dynamic: bool = True,
) -> tuple[int, int]:
    """(forward, backward) of one round of the exchange by rows.

    A query is a (token, owning rank) pair, an entry one of its rows. The arguments list, for every OTHER rank, how many
    this rank receives from it and sends to it (in static mode: the capacities). `dynamic` counts the exchange of sizes.

    forward: queries (count and pre-input) and entries (row number and scores) come in, partial sums come back;
    backward: gradients of partial sums come in, gradients of pre-inputs and scores come back.
    """
    w = widths
    forward = sum(
        align(queries * (4 + w.size * w.pre_value_dim) + entries * (4 + w.size * w.num_cores))
        for queries, entries in zip(queries_in, entries_in, strict=True)
    )
    forward += sum(queries_out) * w.size * w.value_dim + (12 * len(queries_in) if dynamic else 0)
    backward = sum(queries_in) * w.size * w.value_dim + sum(
        align(queries * w.size * w.pre_value_dim + entries * w.size * w.num_cores)
        for queries, entries in zip(queries_out, entries_out, strict=True)
    )
    return forward, backward


def rows_to_all_bytes(widths: Widths, ranks: int, tokens: int) -> tuple[int, int]:
    """(forward, backward) of the exchange by rows with room for everything; every rank has `tokens` tokens (after
    padding): to each rank go their pre-inputs and the numbers and scores of all their rows."""
    w, others = widths, ranks - 1
    scores = tokens * w.size * w.top_m * w.num_cores
    forward = align(tokens * (w.size * w.pre_value_dim + 4 * w.top_m) + scores) + tokens * w.size * w.value_dim
    backward = tokens * w.size * w.value_dim + align(tokens * w.size * w.pre_value_dim + scores)
    return others * forward, others * backward


def expected_queries(ranks: int, tokens: int, top_m: float) -> float:
    """Queries to one rank if every row is equally likely to be anywhere: T * (1 - (1 - 1/P)^M)."""
    return tokens * (1.0 - (1.0 - 1.0 / ranks) ** top_m)


def expected_rows_bytes(widths: Widths, ranks: int, tokens: int) -> tuple[int, int]:
    """`rows_bytes` for evenly spread rows: what the planner assumes, which knows no indices."""
    queries = [round(expected_queries(ranks, widths.blocks * tokens, widths.top_m / widths.blocks))] * (ranks - 1)
    entries = [round(tokens * widths.top_m / ranks)] * (ranks - 1)
    return rows_bytes(widths, queries, entries, queries, entries)
