"""Who waits for whom among tests that share GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tests import conftest
from tests.gpu_sharing import PROCESSES, WORKER, in_turn, prepare_process, tell_groups

SECONDS = 30.0


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")


def enter(threads: ThreadPoolExecutor, *, alone: bool) -> tuple[Event, Event, Future[None]]:
    """Events of being inside and of leave to go."""
    inside, go = Event(), Event()

    def test() -> None:
        with in_turn(alone=alone):
            inside.set()
            assert go.wait(SECONDS)

    return inside, go, threads.submit(test)


def test_one_that_is_alone_waits_for_all_others_and_lets_nobody_in() -> None:
    with ThreadPoolExecutor(4) as threads:
        first, leave, _ = enter(threads, alone=False)
        assert first.wait(SECONDS)
        alone, finish, _ = enter(threads, alone=True)
        assert not alone.wait(0.3)
        second, leave_too, _ = enter(threads, alone=False)
        assert second.wait(SECONDS)
        leave.set()
        assert not alone.wait(0.3)
        leave_too.set()
        assert alone.wait(SECONDS)
        late, leave, _ = enter(threads, alone=False)
        assert not late.wait(0.3)
        finish.set()
        assert late.wait(SECONDS)
        leave.set()


def test_runs_on_other_gpus_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with in_turn(alone=True):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
        with in_turn(alone=True):
            pass


@pytest.mark.parametrize(("worker", "first"), [("gw0", "4,5,7"), ("gw1", "5,7,4"), ("gw11", "7,4,5")])
def test_processes_begin_with_different_gpus(monkeypatch: pytest.MonkeyPatch, worker: str, first: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(WORKER, worker)
    prepare_process()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == first


@pytest.fixture(scope="module")
def shared() -> int:
    return 1


def test_tests_that_share_a_fixture_of_their_file_are_a_group(
    request: pytest.FixtureRequest, tmp_path: Path, shared: int
) -> None:
    def groups(*markers: str) -> dict[str, str]:
        for marker in markers:
            request.node.add_marker(marker)
        tell_groups([request.node], tmp_path / "groups.json")
        return json.loads((tmp_path / "groups.json").read_text())

    assert groups() == {request.node.nodeid: "test_gpu_sharing"}
    assert groups("two_gpus") == {request.node.nodeid: "two_gpus test_gpu_sharing"}
    assert groups("large") == {request.node.nodeid: "large"}


ROOT = Path(__file__).resolve().parents[1]
TIMED = """
import pytest

pytestmark = pytest.mark.gpu

@pytest.fixture(scope="module")
def shared(): ...

@pytest.mark.alone
@pytest.mark.seconds(40)
def test_alone(): ...
def test_one(): ...
@pytest.mark.seconds(20)
def test_twenty(): ...
@pytest.mark.parametrize("number", range(8))
def test_many(shared, number): ...
@pytest.mark.seconds(30)
def test_thirty(): ...
def test_another(shared): ...
@pytest.mark.two_gpus
@pytest.mark.seconds(25)
def test_left_out(): ...
"""


def collected(folder: Path) -> list[str]:
    """Names of tests in the order in which a process of several gets them, without those on two GPUs."""
    found: list[pytest.Item] = []

    class Process:
        @pytest.hookimpl(wrapper=True)
        def pytest_collection_modifyitems(
            self, config: Any, items: list[pytest.Item]
        ) -> Generator[None, object, object]:
            config.workerinput = {"groups": str(folder / "groups.json"), "longest_first": True}
            result = yield from conftest.pytest_collection_modifyitems(config, items)
            found.extend(items)
            return result

    arguments = ["-q", "--collect-only", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not two_gpus", str(folder)]
    assert pytest.main(arguments, plugins=[Process()]) == 0
    return [item.name for item in found]


@pytest.mark.parametrize("processes", [1, 2, 20])
def test_long_tests_begin_first_with_the_shortest_behind_them_and_those_alone_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processes: int
) -> None:
    """A group counts with all of its tests, also those that say nothing of their time; behind it nothing waits. Tests
    that are left out are in nobody's place."""
    (tmp_path / f"test_timed_{processes}.py").write_text(TIMED)
    monkeypatch.setenv(PROCESSES, str(processes))
    group = [*(f"test_many[{number}]" for number in range(8)), "test_another"]
    others = {1: ["test_one", *group, "test_twenty"], 2: [*group, "test_one", "test_twenty"]}
    expected = others.get(processes, [*group, "test_twenty", "test_one"])
    assert collected(tmp_path) == ["test_thirty", *expected, "test_alone"]


CUT = """
import os, signal, time

def test_fails():
    assert 6 * 7 == 41

def test_that_cuts_the_run_off():
    time.sleep(1)  # what is on its way to the parent arrives
    os.kill({process}, signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("arguments", "process"), [([], "os.getpid()"), (["-n1"], "os.getppid()")], ids=["one_process", "several"]
)
def test_failures_are_told_when_they_happen(tmp_path: Path, arguments: list[str], process: str) -> None:
    (tmp_path / "conftest.py").write_text(
        "from tests.conftest import Failures\n"
        "def pytest_configure(config):\n"
        "    if not hasattr(config, 'workerinput'):\n"
        "        config.pluginmanager.register(Failures(config))\n"
    )
    (tmp_path / "test_cut.py").write_text(CUT.format(process=process))
    command = [sys.executable, "-m", "pytest", "-vv", "--tb=short", *arguments, "test_cut.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode < 0
    assert "test_cut.py::test_fails" in done.stdout and "assert (6 * 7) == 41" in done.stdout
