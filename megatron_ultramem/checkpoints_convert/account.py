"""Every tensor accounted for: the check before a conversion, and the table after it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from megatron_ultramem.checkpoints_convert.tensors import Recipe, Shape, TensorInfo
from megatron_ultramem.errors import CheckpointError

_NAMED = 6


def check_sources(recipes: Sequence[Recipe], tensors: Mapping[str, TensorInfo], source: object) -> None:
    """Raises CheckpointError if a tensor of the source is left over, missing or of another shape.

    Args:
        source: the folder, for the message.
    """
    wanted: dict[str, Shape] = {}
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
        raise CheckpointError(f"{source} does not hold the model that its configuration describes: {'; '.join(problems)}")


def print_account(recipes: Sequence[Recipe], tensors: Mapping[str, TensorInfo], console: Console) -> None:
    """Prints which tensors became which, with shapes. Names that differ in their numbers alone share a line."""
    lines: dict[tuple[object, ...], Counter[str]] = {}
    for recipe in recipes:
        sources = tuple(sorted({(_pattern(name), shape) for name, shape in recipe.sources.items()}))
        count = lines.setdefault((sources, _pattern(recipe.name), recipe.shape, recipe.note), Counter())
        count["targets"] += 1
        for name in recipe.sources:
            count[_pattern(name)] += 1
    table = Table("", "source", "shape", "", "target", "shape", "", box=None, pad_edge=False)
    for (sources, target, shape, note), count in lines.items():
        named = sources if isinstance(sources, tuple) and sources else ((str(note), None),)
        for number, (name, source_shape) in enumerate(named):
            left = (f"{count[name]} x" if source_shape is not None else "", name, _text(source_shape))
            right = (f"{count['targets']} x", str(target), _text(shape), str(note) if sources else "")
            table.add_row(*left, *(right if number == 0 else ("", "", "", "")))
    console.print(table)
    used = {name for recipe in recipes for name in recipe.sources}
    assert used == set(tensors)
    console.print(f"{len(used)} tensors of the source went into {len(recipes)} of the target; none is left over or missing")


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _text(shape: object) -> str:
    return "" if shape is None else "x".join(str(size) for size in shape) if isinstance(shape, tuple) else str(shape)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + more
