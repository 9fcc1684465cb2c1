"""Who waits for whom among tests that share GPUs."""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from tests.gpu_sharing import WORKER, in_turn, prepare_process, tell_groups

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


def test_one_that_is_alone_waits_for_those_inside_and_lets_nobody_in() -> None:
    with ThreadPoolExecutor(4) as threads:
        both = [enter(threads, alone=False) for _ in range(2)]
        assert all(inside.wait(SECONDS) for inside, *_ in both)
        alone, finish, _ = enter(threads, alone=True)
        assert not alone.wait(0.3)
        late, leave, _ = enter(threads, alone=False)
        both[0][1].set()
        assert not alone.wait(0.3) and not late.is_set()
        both[1][1].set()
        assert alone.wait(SECONDS)
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
    import os

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
    assert groups("two_gpus") == {request.node.nodeid: "two_gpus"}
