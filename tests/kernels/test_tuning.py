"""Autotuning measures a shape once, remembers it across processes, and never where it must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ultramem_kernels import configure, tuning
from ultramem_kernels.settings import settings

NAMES = ("a", "b")
MS = {"a": 2.0, "b": 1.0}


class Clock:
    """Times of the names; counts what was run."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def run(self, name: str) -> None:
        self.ran.append(name)

    def time_ms(self, call: object) -> float:
        call()  # type: ignore[operator]
        return MS[self.ran[-1]]


def choose(path: Path, clock: Clock, measure: bool = True, shape: tuple[object, ...] = (1, 2)) -> str:
    return tuning.Tuner(path, clock.time_ms).choose("op", shape, NAMES, clock.run, measure)


def test_the_fastest_is_found_and_kept_for_later_processes(tmp_path: Path) -> None:
    clock = Clock()
    assert choose(tmp_path / "deep" / "file.json", clock) == "b" and clock.ran == ["a", "b"]
    assert choose(tmp_path / "deep" / "file.json", clock) == "b" and clock.ran == ["a", "b"]
    assert choose(tmp_path / "deep" / "file.json", clock, shape=(1, 3)) == "b" and len(clock.ran) == 4


def test_without_measuring_an_unknown_shape_gets_the_first_and_a_known_one_its_choice(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "file.json"
    assert choose(path, clock, measure=False) == "a" and not clock.ran and not path.exists()
    choose(path, clock)
    assert choose(path, clock, measure=False) == "b" and len(clock.ran) == 2


@pytest.mark.parametrize("content", ["", "[1]", '{"op 1 2": "gone"}'], ids=["empty", "list", "unknown name"])
def test_a_file_that_does_not_help_is_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    assert choose(path, Clock()) == "b"
    assert json.loads(path.read_text())["op 1 2"] == "b"


def test_what_other_processes_wrote_meanwhile_is_kept(tmp_path: Path) -> None:
    path, clock = tmp_path / "file.json", Clock()
    tuner = tuning.Tuner(path, clock.time_ms)
    tuner.choose("op", (1,), NAMES, clock.run, True)
    path.write_text(json.dumps({**json.loads(path.read_text()), "other 5": "x"}))
    tuner.choose("op", (2,), NAMES, clock.run, True)
    assert set(json.loads(path.read_text())) == {"op 1", "op 2", "other 5"}


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert choose(tmp_path / "file" / "tuned.json", Clock()) == "b"


def test_settings_are_changed_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "autotune", True)
    monkeypatch.setattr(settings, "cache_folder", None)
    configure(autotune=False)
    assert not settings.autotune and settings.cache_folder is None
    configure(cache_folder=str(tmp_path))
    assert not settings.autotune and settings.folder() == tmp_path
