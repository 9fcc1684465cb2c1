"""Python looks for garbage when training says so, and afterwards again when it wants."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_ultramem.training.garbage import collected_every


class Knot:
    """Garbage that only the search for it finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def searches() -> Iterator[list[int]]:
    """Generations that are searched from now on."""
    found: list[int] = []

    def told(phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(told)
    yield found
    gc.callbacks.remove(told)


def knots(number: int) -> list[weakref.ref[Knot]]:
    """More than Python lets pass without a search."""
    return [weakref.ref(Knot()) for _ in range(number)]


def test_garbage_is_found_after_the_steps_that_the_interval_divides(searches: list[int]) -> None:
    many = 3 * gc.get_threshold()[0]
    with collected_every(3) as end_step:
        searches.clear()
        for step in (1, 2, 3, 4, 5):
            lost = knots(many)
            end_step(step)
            assert searches == ([] if step < 3 else [2]), step
            assert any(knot() is not None for knot in lost) == (step != 3)
    assert gc.isenabled() and gc.get_freeze_count() == 0
    knots(many)
    assert searches != [2]


def test_what_was_there_before_is_searched_afterwards() -> None:
    knot = Knot()
    before = weakref.ref(knot)
    with collected_every(1) as end_step:
        del knot
        end_step(1)
        assert before() is not None
    gc.collect()
    assert before() is None


def test_nothing_changes_without_an_interval(searches: list[int]) -> None:
    with collected_every(0) as end_step:
        searches.clear()
        end_step(1)
        assert searches == [] and gc.isenabled()
        knots(3 * gc.get_threshold()[0])
        assert searches


def test_one_that_switched_the_search_off_finds_it_off() -> None:
    gc.disable()
    try:
        with pytest.raises(RuntimeError), collected_every(2):
            raise RuntimeError
        assert not gc.isenabled() and gc.get_freeze_count() == 0
    finally:
        gc.enable()
