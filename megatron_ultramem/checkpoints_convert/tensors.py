"""Named tensors that are read and made in blocks of rows, so that no conversion holds more than one block.

A `Recipe` says how one tensor of the target is made from tensors of the source. What a conversion does is a list of
recipes, complete before the first number is read: `account.py` compares it with what the source has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

BLOCK_BYTES = 1 << 26
Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it."""

    shape: Shape
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorReader(Protocol):
    """A source: names and shapes at once, numbers in blocks of rows."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Entries [start, stop) of the first axis, on the CPU. Raises CheckpointError where the files are damaged."""


@dataclass(frozen=True)
class Recipe:
    """How one tensor of the target is made.

    Attributes:
        sources: what is read, with the shapes that these tensors must have.
        rows: entries [start, stop) of the target's first axis, read from the source.
        dtype: of the target; None: that of its first source.
        note: for the table of the conversion, where the names do not say it.
    """

    name: str
    shape: Shape
    sources: Mapping[str, Shape]
    rows: Callable[[TensorReader, int, int], torch.Tensor]
    dtype: torch.dtype | None = None
    note: str = ""

    def info(self, reader: TensorReader) -> TensorInfo:
        """The target, from a source that has what the recipe needs."""
        return TensorInfo(self.shape, self.dtype or reader.tensors[next(iter(self.sources))].dtype)


@dataclass(frozen=True)
class Made:
    """A tensor of the target, ready to be written: `rows(start, stop)` gives its numbers."""

    name: str
    info: TensorInfo
    rows: Callable[[int, int], torch.Tensor]

    def block(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as they are to be written."""
        block = self.rows(start, stop).to(self.info.dtype).contiguous()
        assert block.shape == (stop - start, *self.info.shape[1:]), (self.name, block.shape, self.info.shape)
        return block


def make(recipe: Recipe, reader: TensorReader) -> Made:
    """Binds a recipe to its source."""
    return Made(recipe.name, recipe.info(reader), lambda start, stop: recipe.rows(reader, start, stop))


def row_blocks(info: TensorInfo, limit: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most `limit` bytes each (and at least one row)."""
    step = max(1, limit // max(1, info.row_bytes))
    for start in range(0, info.shape[0], step):
        yield start, min(info.shape[0], start + step)


def raw_bytes(block: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, without a copy."""
    return block.view(-1).view(torch.uint8).numpy().data
