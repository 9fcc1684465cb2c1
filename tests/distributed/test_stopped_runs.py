"""A run that is asked to stop finishes its step on every rank, saves, ends, and goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_ultramem.config import load_config
from megatron_ultramem.training.checkpoint_folder import list_checkpoints, read_record
from tests.distributed.test_killed_runs import losses, start
from tests.distributed.workers import WorkerPool

STEPS = 8


def train_until_signalled(settings: list[str], number: int, rank: int, at_step: int) -> tuple[int, list[str]]:
    """Trains with a signal to one rank during a step; returns the exit status and the checkpoints."""
    from megatron_ultramem.training import loop

    config = load_config(None, settings)
    run_step = loop.begin_step
    calls = 0

    def begin_step(hooks: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at_step and os.environ["RANK"] == str(rank):
            signal.pthread_kill(threading.main_thread().ident or 0, number)
        run_step(hooks)

    loop.begin_step = begin_step
    try:
        status = loop.train(config)
    finally:
        loop.begin_step = run_step
    return status, [path.name for path in list_checkpoints(Path(config.train.run_dir) / "checkpoints")]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 143)], ids=["usr1", "term"])
def test_a_signal_to_one_rank_stops_all_after_that_very_step(
    pool: WorkerPool, small_run: list[str], tmp_path: Path, number: int, status: int
) -> None:
    settings = [*small_run, f"train.run_dir={tmp_path}", f"train.steps={STEPS}", "checkpoint.load=auto"]
    for result in pool.run(2, train_until_signalled, settings, number, 1, 3):
        assert result == (status, ["step_00000003"])
    for result in pool.run(2, train_until_signalled, settings, number, 0, STEPS - 3):  # in the last step: too late
        assert result == (0, ["step_00000003", f"step_{STEPS:08d}"])


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    """Until the metrics file has that step."""
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or max(losses(run_dir), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 143)], ids=["usr1", "term"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_stopped_and_restarted_run_is_bitwise_equal_to_one_that_was_not(
    small_run: list[str], tmp_path: Path, mode: str, number: int, status: int
) -> None:
    steps = 30
    settings = [setting for setting in small_run if not setting.startswith(("train.run_dir", "checkpoint.load"))]
    settings += [f"train.steps={steps}", "logging.interval=1", "model.hidden_dropout=0.1", "data.num_workers=1"]
    settings += [f"checkpoint.async_save={'true' if mode == 'async' else 'false'}"]
    straight = start([*settings, f"train.run_dir={tmp_path / 'straight'}"], 2, tmp_path / "straight.log")
    assert straight.wait(300) == 0, (tmp_path / "straight.log").read_text()

    run_dir, log, first = tmp_path / "run", tmp_path / "run.log", 0
    for launch in range(3):
        process = start([*settings, f"train.run_dir={run_dir}"], 2, log)
        if launch < 2:
            wait_for_step(run_dir, first + 4, process)
            if number == signal.SIGTERM:
                process.terminate()  # the launcher, which passes it on
            else:  # every process of the ranks, as a scheduler does
                for part in psutil.Process(process.pid).children(recursive=True):
                    part.send_signal(number)
            assert process.wait(120) == status, log.read_text()
            newest = read_record(list_checkpoints(run_dir / "checkpoints")[-1]).step
            assert first + 4 <= newest < steps
            assert f"step {newest}: stopped by {signal.Signals(number).name}" in log.read_text()
            first = newest
    assert process.wait(300) == 0, log.read_text()
    assert f"resuming after step {first}" in log.read_text()
    assert losses(run_dir) == losses(tmp_path / "straight")


def test_a_stop_signal_while_the_run_is_set_up_is_kept_for_its_first_step() -> None:
    code = (
        "import os, signal, subprocess, sys\n"
        "from megatron_ultramem.training.requests import Requests, hold_back_stop_signal\n"
        "hold_back_stop_signal()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "child = subprocess.Popen(['sleep', '30'])\n"
        "child.send_signal(signal.SIGUSR1)\n"
        "requests = Requests()\n"
        "with requests.listening(None):\n"
        "    requests.agree(requests.flags())\n"
        "child.terminate()\n"
        "print(requests.stop, requests.reason, requests.exit_status, child.wait())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "SIGUSR1", "0", str(-signal.SIGTERM)], done.stderr
