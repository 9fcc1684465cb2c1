"""Jobs on a real SLURM: preempted by a signal they save, queue themselves again, and end where an unbroken run ends."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_ultramem.training.checkpoint_folder import list_checkpoints, read_record
from tests.distributed.conftest import corpus, small_run  # noqa: F401
from tests.distributed.test_killed_runs import losses, start
from tests.slurm.cluster import Cluster, missing_programs

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_programs()), reason=f"SLURM is not installed: no {', '.join(missing_programs())}"),
]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
VENV = sys.prefix if sys.prefix != sys.base_prefix else None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.close()


def launch(cluster: Cluster, folder: Path, settings: list[str]) -> str:
    """Submits two CPU ranks with tools/launch_slurm.py; returns the job's number."""
    tree = {
        "job": {"gpus_per_node": 0, "ranks_per_node": 2, "options": {"cpus-per-task": 2}},
        "environment": {"variables": {"CUDA_VISIBLE_DEVICES": ""}, "venv": VENV},
        "train": {"overrides": settings, "script": str(ROOT / "examples" / "slurm" / "train.sbatch")},
    }
    (folder / "launch.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, str(ROOT / "tools" / "launch_slurm.py"), str(folder / "launch.yaml")]
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return cluster.run(*command, environment=path).strip()


def output(run_dir: Path) -> str:
    return "\n".join(log.read_text() for log in run_dir.glob("launches/*/slurm-*.log"))


def wait_for_step(cluster: Cluster, job: str, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 180
    while not (run_dir / "metrics.jsonl").exists() or max(losses(run_dir), default=0) < step:
        assert time.monotonic() < deadline and cluster.job(job)["JobState"] in ("PENDING", "RUNNING"), output(run_dir)
        time.sleep(0.05)


def start_at_once(cluster: Cluster, job: str, restarts: int) -> None:
    """SLURM holds a requeued job back for two minutes, because credentials of its last start are refused."""
    deadline = time.monotonic() + 60
    while (found := cluster.job(job))["Restarts"] != str(restarts) or found["JobState"] != "PENDING":
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    time.sleep(2.0)  # those of this very second have
    cluster.run("scontrol", "update", f"job={job}", "starttime=now")


def test_a_preempted_job_queues_itself_again_and_ends_as_one_that_was_not(
    cluster: Cluster,
    small_run: list[str],  # noqa: F811
    tmp_path: Path,
) -> None:
    settings = [setting for setting in small_run if not setting.startswith(("train.run_dir", "checkpoint.load"))]
    settings += [f"train.steps={STEPS}", "logging.interval=1", "model.hidden_dropout=0.1", "data.num_workers=1"]
    straight = start([*settings, f"train.run_dir={tmp_path / 'straight'}"], 2, tmp_path / "straight.log")
    assert straight.wait(300) == 0, (tmp_path / "straight.log").read_text()

    run_dir = tmp_path / "run of $(touch pwned) 100%"
    job = launch(cluster, tmp_path, [*settings, f"train.run_dir={run_dir}"])
    stopped_at = []
    for restarts in (1, 2):
        wait_for_step(cluster, job, run_dir, (stopped_at or [0])[-1] + 3)
        cluster.run("scancel", "--batch", "--signal=USR1", job)  # what SLURM does before the limit and at preemption
        start_at_once(cluster, job, restarts)
        stopped_at.append(read_record(list_checkpoints(run_dir / "checkpoints")[-1]).step)
    ended = cluster.wait_for_state(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", seconds=180)
    text = output(run_dir)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("COMPLETED", "2", "0:0"), text
    assert 3 <= stopped_at[0] < stopped_at[1] < STEPS
    for step in stopped_at:
        assert f"step {step}: stopped by SIGUSR1" in text and f"resuming after step {step}" in text
    assert losses(run_dir) == losses(tmp_path / "straight")
    assert tensors(run_dir) == tensors(tmp_path / "straight")
    assert not list(tmp_path.rglob("pwned"))


def tensors(run_dir: Path) -> dict[str, bytes]:
    """Every tensor of the newest checkpoint, model and optimizer, as bytes."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(list_checkpoints(run_dir / "checkpoints")[-1])
    found = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    load(found, storage_reader=reader, no_dist=True)
    assert found
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in found.items()}


def test_a_job_that_cannot_stop_in_time_is_queued_again_all_the_same(cluster: Cluster, tmp_path: Path) -> None:
    """Its ranks hang: the script itself sends it back before the limit would end it for good."""
    (tmp_path / "megatron_ultramem").mkdir()
    (tmp_path / "megatron_ultramem" / "__init__.py").touch()
    # Hears of no signal, but runs to its end when it is started for the second time.
    (tmp_path / "megatron_ultramem" / "__main__.py").write_text(
        "import os, signal, time\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})\n"
        "print('started', flush=True)\n"
        "time.sleep(0 if os.environ.get('SLURM_RESTART_COUNT') else 600)\n"
    )
    log = tmp_path / "job.log"
    job = cluster.run(
        "sbatch", "--parsable", f"--output={log}", "--cpus-per-task=1", str(ROOT / "examples/slurm/train.sbatch"), "x",
        environment={
            "ULTRAMEM_CODE": str(tmp_path),
            "ULTRAMEM_RANKS_PER_NODE": "1",
            "ULTRAMEM_GRACE_SECONDS": "2",
            "ULTRAMEM_VENV": VENV or "",
        },
    ).strip()  # fmt: skip
    deadline = time.monotonic() + 60
    while not log.exists() or "started" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else cluster.job(job)
        time.sleep(0.2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    start_at_once(cluster, job, 1)
    ended = cluster.wait_for_state(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log.read_text()


def test_the_time_limit_reaches_the_script_as_a_signal(cluster: Cluster, tmp_path: Path) -> None:
    """What the example asks for with --signal=B:USR1@..., with a job that only says that it came."""
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\ntrap 'echo signalled; exit 0' USR1\nfor i in {1..100}; do sleep 1; done\n")
    log = tmp_path / "job.log"
    options = [f"--output={log}", "--time=1", "--signal=B:USR1@55"]
    job = cluster.run("sbatch", "--parsable", *options, str(script)).strip()
    cluster.wait_for_state(job, "COMPLETED", "TIMEOUT", seconds=90)
    assert log.read_text() == "signalled\n"


def test_the_cluster_leaves_nothing_behind() -> None:
    made = Cluster()
    daemons = [daemon.pid for daemon in made._daemons]
    made.close()
    assert not made.folder.exists()
    for pid in daemons:
        assert subprocess.run(["ps", "-p", str(pid)], capture_output=True).returncode != 0
