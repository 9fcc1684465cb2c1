"""Which part of a table a rank holds: equal blocks of rows, and a range of columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_ultramem.memory.init import Initializer, fill_


@dataclass(frozen=True)
class TableShard:
    """The rows [start, start + block_rows) for every `start` of `row_starts`, in this order, of the columns
    [column_start, column_start + columns) of a table of `rows` x `width`.

    Row starts are multiples of block_rows, and column_start of columns: shards of all ranks lie on one regular grid.
    """

    rows: int
    width: int
    row_starts: tuple[int, ...]
    block_rows: int
    column_start: int
    columns: int

    @classmethod
    def whole(cls, rows: int, width: int) -> TableShard:
        """All of the table."""
        return cls(rows, width, (0,), rows, 0, width)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tensor that holds the shard."""
        return len(self.row_starts) * self.block_rows, self.columns

    def pieces(self) -> Iterator[tuple[slice, tuple[int, int]]]:
        """The local rows of every block, and its place (row, column) in the table."""
        for number, start in enumerate(self.row_starts):
            yield slice(number * self.block_rows, (number + 1) * self.block_rows), (start, self.column_start)

    def draw_(self, table: torch.Tensor, initializer: Initializer, seed: int, name: str) -> None:
        """Fills the local tensor with its part of the numbers that the whole table (seed, name) has."""
        for rows, offset in self.pieces():
            fill_(table[rows], initializer, seed, name, global_shape=(self.rows, self.width), offset=offset)
