"""Every tensor accounted for: the check before a conversion, and the table after it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rich.console import Console

from megatron_ultramem.checkpoints_convert.tensors import Recipe, Shape, TensorInfo
from megatron_ultramem.errors import CheckpointError

_NAMED = 6


def check_sources(
    recipes: Sequence[Recipe], tensors: Mapping[str, TensorInfo], source: object, compared: Mapping[str, Shape]
) -> None:
    """Raises CheckpointError if a tensor of the source is left over, missing or of another shape.

    Args:
        source: the folder, for the message.
        compared: tensors that go into none of the target, but must have these shapes.
    """
    wanted: dict[str, Shape] = dict(compared)
    for recipe in recipes:
        wanted.update(recipe.sources)
    misshapen = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (
            ("tensors that this model does not have are left over:", sorted(set(tensors) - set(wanted))),
            ("tensors are missing:", sorted(set(wanted) - set(tensors))),
            ("tensors have another shape:", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source} does not hold the model that its configuration describes: {'; '.join(problems)}"
        )


def print_account(
    recipes: Sequence[Recipe], tensors: Mapping[str, TensorInfo], compared: Mapping[str, str], console: Console
) -> None:
    """Prints which tensors became which, with shapes. Names that differ in their numbers alone share a line.

    Args:
        compared: tensors of the source that became none of the target, and why not.
    """
    lines: dict[_Line, Counter[str]] = {}
    for recipe in recipes:
        sources = tuple(sorted({(_pattern(name), shape) for name, shape in recipe.sources.items()}))
        count = lines.setdefault(_Line(sources, _pattern(recipe.name), recipe.shape, recipe.note), Counter())
        count.update([_TARGETS, *(_pattern(name) for name in recipe.sources)])
    for name, reason in compared.items():
        line = _Line(((_pattern(name), tensors[name].shape),), "", None, reason)
        lines.setdefault(line, Counter()).update([_pattern(name)])
    rows = [("", "source", "shape", "", "target", "shape", "")]
    for line, count in lines.items():
        target = (_times(count[_TARGETS]), line.target, _text(line.shape), line.note)
        for number, (name, shape) in enumerate(line.sources or (("", None),)):
            rows.append((_times(count[name]), name, _text(shape), *(target if number == 0 else ("",) * 4)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # as wide as it is: a name that is cut off accounts for nothing
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        console.print("  ".join(cells).rstrip(), markup=False, soft_wrap=True)
    used = {name for recipe in recipes for name in recipe.sources} | set(compared)
    assert used == set(tensors)
    console.print(
        f"{len(used)} tensors of the source, {len(recipes)} of the target: none is left over, none is missing"
    )


_TARGETS = "->"


class _Line(NamedTuple):
    """Tensors that became another in the same way."""

    sources: tuple[tuple[str, Shape], ...]
    target: str
    shape: Shape | None
    note: str


def _times(count: int) -> str:
    return f"{count} x" if count else ""


def _text(shape: Shape | None) -> str:
    return "" if shape is None else "x".join(str(size) for size in shape)


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + more
