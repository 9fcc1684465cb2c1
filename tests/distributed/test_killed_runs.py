"""A real run that is killed with SIGKILL while it saves goes on from a whole checkpoint, to the very same end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_ultramem.training.checkpoint_folder import list_checkpoints, read_record

STEPS = 12
# Seconds after a save's folder appears: before, within and after its writing. None: as soon as the folder is renamed.
DELAYS = (0.0, 0.02, 0.1, 0.3, None)


def start(settings: list[str], ranks: int, log: Path) -> subprocess.Popen[bytes]:
    """`python -m megatron_ultramem train`."""
    command = [sys.executable, "-m", "megatron_ultramem", "train", *(["--ranks", "2"] if ranks == 2 else []), *settings]
    with log.open("wb") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def kill_while_saving(
    process: subprocess.Popen[bytes], folder: Path, delay: float | None, ranks: int, one_rank_alone: bool
) -> bool:
    """Kills the run `delay` after its second save began; False if it ended by itself before."""
    saves: set[str] = set()
    published = len(list_checkpoints(folder))
    while process.poll() is None:
        drafts = {path.name for path in folder.glob(".saving-*")}
        saves |= drafts
        if delay is None and len(list_checkpoints(folder)) > published:
            break
        if delay is not None and drafts and len(saves) >= 2:
            time.sleep(delay)
            break
        time.sleep(0.001)
    if process.poll() is not None:
        return False
    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    if one_rank_alone:  # its writers live on for a moment; the launcher ends the other rank
        (everything[0].children() if ranks == 2 else everything)[-1 if ranks == 2 else 0].kill()
        assert process.wait(60) != 0
    for part in everything:  # as when a machine is lost
        with contextlib.suppress(psutil.NoSuchProcess):
            part.kill()
    process.wait()
    return True


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_run_killed_while_saving_ends_as_one_that_was_not(
    small_run: list[str], tmp_path: Path, mode: str, ranks: int
) -> None:
    settings = [setting for setting in small_run if not setting.startswith(("train.run_dir", "checkpoint.load"))]
    settings += [f"train.steps={STEPS}", "checkpoint.interval=1", "logging.interval=1", "checkpoint.keep_last=2"]
    settings += ["model.hidden_dropout=0.1", f"checkpoint.async_save={'true' if mode == 'async' else 'false'}"]
    straight = start([*settings, f"train.run_dir={tmp_path / 'straight'}"], ranks, tmp_path / "straight.log")
    assert straight.wait(300) == 0, (tmp_path / "straight.log").read_text()

    run_dir, log = tmp_path / "run", tmp_path / "run.log"
    folder, kills = run_dir / "checkpoints", 0
    for number, delay in enumerate(random.Random(ranks).sample(DELAYS, len(DELAYS))):
        process = start([*settings, f"train.run_dir={run_dir}"], ranks, log)
        killed = kill_while_saving(process, folder, delay, ranks, one_rank_alone=number % 2 == 1)
        for path in list_checkpoints(folder):
            assert read_record(path).step == int(path.name.removeprefix("step_"))
        if not killed:
            break
        kills += 1
        errors = [line for line in log.read_text().splitlines() if line.startswith("error")]
        if ranks == 2 and number % 2 == 1:
            assert errors[-1] == "error: rank 1 was ended by signal SIGKILL"  # the launcher's; the first is rank 0's
            assert all(line.startswith("error [rank 0]: rank 1 on ") for line in errors[:-1])
    assert kills >= 2
    newest = read_record(list_checkpoints(folder)[-1]).step
    assert newest > 0
    last = start([*settings, f"train.run_dir={run_dir}"], ranks, log)
    assert last.wait(300) == 0, log.read_text()
    assert newest == STEPS or f"resuming after step {newest}" in log.read_text()
    assert losses(run_dir) == losses(tmp_path / "straight")
    assert [path.name for path in list_checkpoints(folder)] == [f"step_{step:08d}" for step in (STEPS - 1, STEPS)]
    assert not list(folder.glob(".saving-*"))
