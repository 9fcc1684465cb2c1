"""Jobs of several ranks beside each other on places of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ultramem.side_by_side import Job, dealt, gpu_names, run_jobs

RANK = """
import json, os, sys, time
from pathlib import Path
from megatron_ultramem.side_by_side import wait_for_turn
folder, name, seconds, fails = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4] == os.environ["RANK"]
if os.environ["RANK"] == "0":
    (folder / f"{name}.ready").write_text(str(time.time()))
wait_for_turn()
began = time.time()
if fails:
    print(f"{name} has a reason", flush=True)
    raise SystemExit(1)
time.sleep(seconds)
found = {k: os.environ.get(k) for k in ("WORLD_SIZE", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "MORE")}
(folder / f"{name}.{os.environ['RANK']}").write_text(json.dumps({**found, "began": began, "ended": time.time()}))
"""


def job(folder: Path, name: str, ranks: int, seconds: float = 0.0, failing: str = "") -> Job:
    (folder / "rank.py").write_text(RANK)
    command = [sys.executable, str(folder / "rank.py"), str(folder), name, str(seconds), failing]
    return Job(name, command, ranks, folder / f"{name}.log", {"MORE": name})


def run(jobs: list[Job], places: int, seconds: float = 60, job_seconds: float = 30) -> dict[str, str]:
    for number, own in dealt([one.ranks for one in jobs], places):
        jobs[number].places = own
    found: dict[str, str] = {}
    gpus = [f"gpu{place}" for place in range(places)]
    run_jobs(jobs, gpus, seconds=seconds, job_seconds=job_seconds, ended=lambda one, why: found.update({one.name: why}))
    return found


def told(folder: Path, name: str, rank: int = 0) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / f"{name}.{rank}").read_text())
    return found


def test_less_important_jobs_fill_the_places_that_a_round_leaves_over() -> None:
    assert dealt([4, 1, 2, 4, 1, 1, 2], 4) == [
        (0, (0, 1, 2, 3)), (1, (0,)), (2, (1, 2)), (4, (3,)), (3, (0, 1, 2, 3)), (5, (0,)), (6, (1, 2)),
    ]  # fmt: skip


@pytest.mark.parametrize(("named", "names"), [(None, ["0", "1"]), ("3,7", ["3", "7"])])
def test_names_of_gpus_are_those_this_process_sees(
    monkeypatch: pytest.MonkeyPatch, named: str | None, names: list[str]
) -> None:
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpu_names(2) == names


def test_jobs_run_beside_each_other_on_places_of_their_own_and_import_before_their_turn(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "a", 2, 1.5), job(tmp_path, "b", 2, 1.5), job(tmp_path, "c", 4, 0.0)]
    assert run(jobs, 4) == {"a": "", "b": "", "c": ""}
    a, b, c = (told(tmp_path, name) for name in "abc")
    assert (a["CUDA_VISIBLE_DEVICES"], b["CUDA_VISIBLE_DEVICES"]) == ("gpu0,gpu1", "gpu2,gpu3")
    assert a["WORLD_SIZE"] == "2" and a["MORE"] == "a" and told(tmp_path, "a", 1)["MASTER_PORT"] == a["MASTER_PORT"]
    assert a["MASTER_PORT"] != b["MASTER_PORT"]
    assert max(a["began"], b["began"]) < min(a["ended"], b["ended"]) <= c["began"]  # type: ignore[type-var, operator]
    assert float((tmp_path / "c.ready").read_text()) < a["ended"]  # type: ignore[operator]


def test_a_job_that_fails_or_hangs_costs_the_others_nothing(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "fails", 2, 60, failing="1"), job(tmp_path, "hangs", 1, 60), job(tmp_path, "works", 1)]
    began = time.monotonic()
    found = run(jobs, 2, job_seconds=6)
    assert found == {"fails": "failed", "hangs": "took more than 6 s", "works": ""}
    assert "fails has a reason" in jobs[0].last_words() and time.monotonic() - began < 40
    assert not any(_alive(process.pid) for one in jobs for process in one._processes)


def test_the_first_error_is_told_however_much_the_other_ranks_said_since(tmp_path: Path) -> None:
    one = job(tmp_path, "fails", 2)
    left = [
        "[rank3]:[W1122 13:21:15.370816252 TCPStore.cpp:125] [c10d] recvValue failed on SocketImpl(fd=66)",
        "Exception raised from recvBytes at /pytorch/torch/csrc/Utils.hpp:682 (most recent call first):",
        *(f"frame #{number}: c10::Error::Error(c10::SourceLocation) + 0x9d (0x7f)" for number in range(9)),
        "",
    ]
    traceback = [f'[rank0]:   File "step.py", line {number}, in step' for number in range(9)]
    reason = "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.55 GiB."
    one.log.write_text("\n".join(["started", *traceback, reason, *left * 6]))
    assert one.last_words().splitlines() == ["started", *traceback, reason]
    one.log.write_text("\n".join([*traceback, reason, *(f"[rank1]: line {number}" for number in range(40))]))
    said = one.last_words().splitlines()
    assert said[:2] == [reason, "..."] and said[-1] == "[rank1]: line 39" and len(said) < 30


def test_at_the_end_of_the_time_what_runs_is_ended(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "works", 1), job(tmp_path, "goes_on", 1, 60), job(tmp_path, "waits", 2)]
    found = run(jobs, 2, seconds=4)
    assert found["works"] == "" and "after 4 s in all" in found["goes_on"] and "no time left" in found["waits"]
    assert not any(_alive(process.pid) for one in jobs for process in one._processes)


def test_a_rank_whose_starter_is_gone_ends(tmp_path: Path) -> None:
    command = job(tmp_path, "alone", 1).command
    done = subprocess.run(command, env={**os.environ, "RANK": "0"}, stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 1 and not (tmp_path / "alone.0").exists()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
