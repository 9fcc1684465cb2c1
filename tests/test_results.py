"""Results files say where every figure comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ultramem.results import Row, write_results


def test_cases_of_earlier_calls_keep_their_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(commit: str, *cases: str) -> dict:
        monkeypatch.setenv("COMMIT", commit)
        monkeypatch.setattr("sys.argv", ["tools/bench.py", commit])
        content: dict = json.loads(write_results(tmp_path, "b", [Row(c, "ms", 1.0, "ms") for c in cases]).read_text())
        return content

    assert "earlier" not in measure("one", "x", "y", "z")
    second = measure("two", "y")
    assert [(call["commit"], call["cases"]) for call in second["earlier"]] == [("one", ["x", "z"])]
    third = measure("three", "x", "w")
    assert [(call["commit"], call["cases"]) for call in third["earlier"]] == [("one", ["z"]), ("two", ["y"])]
    assert third["earlier"][0]["command"] == "python tools/bench.py one" and third["commit"] == "three"
    assert {row["case"] for row in third["rows"]} == {"w", "x", "y", "z"}
    assert "earlier" not in measure("four", "w", "x", "y", "z")


def test_a_call_that_writes_after_every_case_is_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for commit, case in (("one", "x"), ("two", "y"), ("two", "z"), ("two", "w")):
        monkeypatch.setenv("COMMIT", commit)
        path = write_results(tmp_path, "b", [Row(case, "ms", 1.0, "ms")])
    content = json.loads(path.read_text())
    assert [(call["commit"], call["cases"]) for call in content["earlier"]] == [("one", ["x"])]
    assert {row["case"] for row in content["rows"]} == {"w", "x", "y", "z"}


def test_a_write_that_is_cut_off_leaves_the_results_that_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_results(tmp_path, "b", [Row("x", "ms", 1.0, "ms")])
    before = path.read_text()

    def half(written: Path, text: str) -> None:
        written.write_bytes(text[: len(text) // 2].encode())
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space left"):
        write_results(tmp_path, "b", [Row("y", "ms", 1.0, "ms")])
    assert path.read_text() == before


def test_figures_of_earlier_calls_that_are_derived_anew_keep_their_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row("x", "ms", 1.0, "ms"), Row("y", "ms", 1.0, "ms")]
    for commit, measured in (("one", ["x", "y"]), ("two", ["y"]), ("two", ["y"])):  # the last writes after every case
        monkeypatch.setenv("COMMIT", commit)
        path = write_results(tmp_path, "b", [*rows, Row("x", "times", 2.0, "x")], measured=measured)
    content = json.loads(path.read_text())
    assert [(call["commit"], call["cases"]) for call in content["earlier"]] == [("one", ["x"])]
    assert content["commit"] == "two" and len(content["rows"]) == 3
