"""A rank that is killed, stops or hangs ends the run within a bounded time, with a report that names it; under
torchrun's agent the run starts again and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ultramem.training.watchdog import EXIT_CODE
from tests.distributed.test_killed_runs import losses

STEP, SILENT, HANG = 3, 6.0, 15.0  # seconds; a busy machine takes a few for a first save
SETTINGS = [
    "train.steps=4",
    "checkpoint.interval=1",
    "logging.interval=1",
    "train.eval_steps=0",
    "checkpoint.load=auto",
    "faults.heartbeat_seconds=0.5",
    f"faults.silent_seconds={SILENT}",
    f"faults.hang_minutes={HANG / 60}",
]
HOST = re.escape(socket.gethostname())


def torchrun(
    fault: str, rank: int, settings: list[str], run_dir: Path, *, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Two ranks, of which `rank` meets `fault` at step 3."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", "-m", "tests.distributed.fault_job"]
    command += [fault, str(rank), str(STEP), "train", *settings, *SETTINGS, f"train.run_dir={run_dir}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def report(run_dir: Path) -> dict:
    (line,) = (run_dir / "faults.jsonl").read_text().splitlines()
    return json.loads(line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank"),
    [("killed", 0), ("killed", 1), ("stopped", 0), ("stopped", 1), ("sleeps", 1), ("lonely_collective", 0)],
)
def test_a_fault_ends_the_run_and_is_reported(small_run: list[str], tmp_path: Path, fault: str, rank: int) -> None:
    result = torchrun(fault, rank, small_run, tmp_path)
    assert result.returncode != 0
    found, other = report(tmp_path), 1 - rank
    assert found["text"] in result.stderr
    kinds = {"killed": "lost", "stopped": "silent", "sleeps": "hang", "lonely_collective": "hang"}
    assert found["kind"] == kinds[fault]
    assert f"rank {rank} on " in found["text"]
    named = {sign["rank"]: sign for sign in found["ranks"]}
    assert named.keys() == ({0, 1} if fault == "lonely_collective" else {rank})
    assert named[rank]["host"] == socket.gethostname()
    last_sign_of_life = rf"(step {STEP}, training|step {STEP - 1}, \w+)"  # half a second old
    step = last_sign_of_life if fault in ("killed", "stopped") else f"step {STEP}, training"
    where = rf"rank {rank} on {HOST} \(pid {named[rank]['pid']}\), {step}, last collective gloo:\w+ \d+ of \S+"
    assert re.search(where, found["text"]), found["text"]
    if fault == "killed":
        assert rf"noticed by rank {other} on " in found["text"]
    if fault == "stopped":
        assert found["reported_by"] == other and "no sign of life for 6 s" in found["text"]
    if fault == "sleeps":
        assert re.search(rf"; in gloo:\w+ \d+ of \S+ wait ranks {other}$", found["text"]), found["text"]
        stacks = tmp_path / "faults" / f"restart_0_rank_{rank:05d}.stacks"
        assert "fault_job.py" in stacks.read_text()
        recorders = json.loads(stacks.with_suffix(".collectives.json").read_text())
        assert any(recorder.get("entries") for recorder in recorders.values())
    if fault != "killed":
        assert f"exitcode  : {EXIT_CODE} " in result.stderr  # torchrun's table


@pytest.fixture(scope="module")
def straight(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a fault."""
    folder = tmp_path_factory.mktemp("straight")
    result = torchrun("none", 0, small_run, folder)
    assert result.returncode == 0, result.stderr
    assert not (folder / "faults.jsonl").exists()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "stopped", "sleeps"])
def test_a_run_restarted_in_place_ends_as_one_without_the_fault(
    small_run: list[str], straight: Path, tmp_path: Path, fault: str
) -> None:
    result = torchrun(fault, 1, small_run, tmp_path, restarts=1)
    assert result.returncode == 0, result.stderr
    assert f"restart 1: resuming after step {STEP - 1} in " in result.stdout
    assert losses(tmp_path) == losses(straight)
    assert report(tmp_path)["restart"] == 0
