"""Ties between our tensors and those of a Hugging Face folder. Each knows both directions.

Ours is always one tensor (Megatron fuses projections); theirs are one or several.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from megatron_ultramem.checkpoints_convert.tensors import Recipe, Shape, TensorReader


class Link(ABC):
    """One of our tensors and what it is on the other side."""

    @abstractmethod
    def to_theirs(self) -> list[Recipe]:
        """Recipes of their tensors from ours."""

    @abstractmethod
    def to_ours(self) -> list[Recipe]:
        """Recipe of ours from theirs."""


@dataclass(frozen=True)
class Same(Link):
    """The same tensor under another name."""

    ours: str
    theirs: str
    shape: Shape

    def to_theirs(self) -> list[Recipe]:
        return [renamed(self.ours, self.theirs, self.shape)]

    def to_ours(self) -> list[Recipe]:
        return [renamed(self.theirs, self.ours, self.shape)]


def renamed(source: str, target: str, shape: Shape) -> Recipe:
    """The same numbers under another name."""
    return Recipe(target, shape, {source: shape}, lambda reader, start, stop: reader.read(source, start, stop))


@dataclass(frozen=True)
class Stacked(Link):
    """Theirs stacked: ours, with the axes before the last flattened into one, is their rows one tensor after another.

    SwiGLU's two matrices are `[2F, h]` = gate, up; experts are `[E, 2F, h]` = gate 0, up 0, gate 1, ….

    Attributes:
        shape: of ours.
        theirs: their names and numbers of rows, in order.
    """

    ours: str
    shape: Shape
    theirs: tuple[tuple[str, int], ...]

    @property
    def _width(self) -> int:
        return self.shape[-1]

    @property
    def _inner(self) -> int:
        """Flat rows in one entry of our first axis."""
        return math.prod(self.shape[1:-1])

    def to_theirs(self) -> list[Recipe]:
        recipes, first = [], 0
        for name, rows in self.theirs:
            recipes.append(self._part(name, rows, first))
            first += rows
        return recipes

    def _part(self, name: str, rows: int, first: int) -> Recipe:
        def read(reader: TensorReader, start: int, stop: int) -> torch.Tensor:
            low, high = first + start, first + stop
            entry = low // self._inner
            flat = reader.read(self.ours, entry, -(-high // self._inner)).reshape(-1, self._width)
            return flat[low - entry * self._inner : high - entry * self._inner]

        return Recipe(name, (rows, self._width), {self.ours: self.shape}, read)

    def to_ours(self) -> list[Recipe]:
        def read(reader: TensorReader, start: int, stop: int) -> torch.Tensor:
            low, high = start * self._inner, stop * self._inner
            pieces, first = [], 0
            for name, rows in self.theirs:
                begin, end = max(low, first), min(high, first + rows)
                if begin < end:
                    pieces.append(reader.read(name, begin - first, end - first))
                first += rows
            return torch.cat(pieces).view(stop - start, *self.shape[1:])

        return [Recipe(self.ours, self.shape, {name: (rows, self._width) for name, rows in self.theirs}, read)]


@dataclass(frozen=True)
class GroupedQkv(Link):
    """Megatron's fused attention projection: for every group its query heads, its key head, its value head.

    Theirs are three matrices whose rows are head after head. All are small, so they are read whole.
    """

    ours: str
    theirs: tuple[str, str, str]
    heads: int
    groups: int
    head_dim: int
    hidden: int

    @property
    def _heads_in_group(self) -> int:
        return self.heads // self.groups + 2

    @property
    def _shape(self) -> Shape:
        return (self.groups * self._heads_in_group * self.head_dim, self.hidden)

    @property
    def _their_heads(self) -> tuple[int, int, int]:
        return (self.heads, self.groups, self.groups)

    def to_theirs(self) -> list[Recipe]:
        queries = self.heads // self.groups
        places = (slice(0, queries), slice(queries, queries + 1), slice(queries + 1, None))
        return [
            self._part(name, heads, place)
            for name, heads, place in zip(self.theirs, self._their_heads, places, strict=True)
        ]

    def _part(self, name: str, heads: int, place: slice) -> Recipe:
        def read(reader: TensorReader, start: int, stop: int) -> torch.Tensor:
            grouped = reader.read(self.ours).view(self.groups, self._heads_in_group, self.head_dim, self.hidden)
            return grouped[:, place].reshape(-1, self.hidden)[start:stop]

        return Recipe(name, (heads * self.head_dim, self.hidden), {self.ours: self._shape}, read)

    def to_ours(self) -> list[Recipe]:
        shapes = {
            name: (heads * self.head_dim, self.hidden)
            for name, heads in zip(self.theirs, self._their_heads, strict=True)
        }

        def read(reader: TensorReader, start: int, stop: int) -> torch.Tensor:
            return grouped_qkv(*(reader.read(name) for name in self.theirs), groups=self.groups)[start:stop]

        return [Recipe(self.ours, self._shape, shapes, read)]


def grouped_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, groups: int) -> torch.Tensor:
    """Megatron's order of rows from head-major projections `[heads * head width, h]` of queries, keys and values."""
    parts = [part.view(groups, -1, part.shape[-1]) for part in (q, k, v)]
    return torch.cat(parts, dim=1).view(-1, q.shape[-1])
