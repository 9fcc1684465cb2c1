"""A short soak: tools/soak.py with a few faults; and its own parts, which must not pass what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from megatron_ultramem.soak import verify
from megatron_ultramem.soak.disk import SmallDisk
from megatron_ultramem.soak.faults import KINDS, plan
from tests.distributed.checkpoint_job import train_and_save
from tests.distributed.workers import WorkerPool

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("save", "seed"), [("async", 11), ("sync", 12)])
def test_a_run_under_six_faults_ends_with_the_bits_of_a_run_without(tmp_path: Path, save: str, seed: int) -> None:
    command = [sys.executable, str(ROOT / "tools" / "soak.py"), "--faults", "6", "--seed", str(seed), "--save", save]
    command += ["--folder", str(tmp_path / "work"), "--output", str(tmp_path), "--limit-minutes", "9"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, result.stderr
    assert f"seed {seed}: 6 faults of " in result.stderr
    rows = {row["metric"]: row["value"] for row in json.loads((tmp_path / "soak_cpu.json").read_text())["rows"]}
    assert rows["seed"] == seed and rows["restarts"] >= 1
    assert rows["checkpoints_equal_by_every_bit"] == 14  # of 40 steps, one every 3
    assert sum(value for name, value in rows.items() if name.startswith("faults_")) == 6


def test_a_seed_gives_the_same_faults_and_every_kind_as_often() -> None:
    plans = plan(3, 30, 160)
    assert plans == plan(3, 30, 160) != plan(4, 30, 160)
    assert Counter(fault.kind for fault in plans) == dict.fromkeys(KINDS, 5)
    steps = [fault.step for fault in plans if fault.step is not None]
    assert steps == sorted(steps) and steps[0] >= 2 and steps[-1] < 157
    assert {fault.kind for fault in plan(3, 30, 160, ("kill", "stop"))} == {"kill", "stop"}


def test_checkpoints_that_differ_by_one_bit_are_told_apart(
    pool: WorkerPool, small_run: list[str], tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pool.run(1, train_and_save, [*small_run, f"checkpoint.dir={tmp_path / name}", f"train.seed={seed}"], 1, (1,))
    a, b, c = (tmp_path / name / "step_00000001" for name in "abc")
    assert verify.differences(b, a) == []
    different = verify.differences(c, a)
    assert any("exp_avg" in name for name in different) and any("pools" in name for name in different)
    assert verify.damage(a) is None
    shutil.copytree(a, tmp_path / "d")
    (tmp_path / "d" / "run.json").write_text("{}")
    assert "run.json" in str(verify.damage(tmp_path / "d"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_the_small_disk_is_full_while_it_is_filled(tmp_path: Path) -> None:
    import threading

    try:
        with SmallDisk(tmp_path / "disk", 1) as disk:
            filler = threading.Thread(target=disk.fill, args=(4.0,))
            filler.start()
            deadline = time.monotonic() + 60
            while shutil.disk_usage(disk.folder).free:
                assert filler.is_alive() and time.monotonic() < deadline
                time.sleep(0.01)
            with pytest.raises(OSError, match="No space left"):
                (tmp_path / "disk" / "meanwhile").write_bytes(b"x" * 4096)
            filler.join()
            (tmp_path / "disk" / "after").write_bytes(b"x" * 4096)
        assert not list((tmp_path / "disk").iterdir())
    except PermissionError as error:
        pytest.skip(f"mounting is not allowed: {error}")
