"""Submitting to SLURM: what is snapshotted, what is refused, and that no value of a file is ever run by a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_ultramem.config import load_config
from megatron_ultramem.errors import ConfigError
from megatron_ultramem.slurm import plan_launch, submit

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples" / "slurm"
HOSTILE = "a b'\"; touch pwned; $(touch pwned) `touch pwned` *\\"


def write_launch(folder: Path, run_dir: str, **job: object) -> Path:
    (folder / "run.yaml").write_text(yaml.safe_dump({"model": {"num_layers": 2}}))
    tree = {
        "job": {"name": HOSTILE, "gpus_per_node": 4, **job},
        "environment": {"variables": {"NCCL_DEBUG": HOSTILE}},
        "train": {
            "config": str(folder / "run.yaml"),
            "overrides": [f"train.run_dir={run_dir}", "optimizer.lr=1e-3"],
            "script": str(SCRIPTS / "train.sbatch"),
        },
    }
    (folder / "launch.yaml").write_text(yaml.safe_dump(tree))
    return folder / "launch.yaml"


def recorder(folder: Path, name: str, prints: str = "") -> None:
    """A program that stands in for SLURM's: writes its arguments and ULTRAMEM_ variables, separated by zero bytes."""
    program = folder / name
    program.write_text(
        f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"{folder}/{name}.args"\n'
        f'env -0 >"{folder}/{name}.environment"\necho {prints}\n'
    )
    program.chmod(0o755)


def recorded(folder: Path, name: str, what: str = "args") -> list[str]:
    return (folder / f"{name}.{what}").read_text().split("\0")[:-1]


def test_the_snapshot_holds_settings_code_and_script_and_nothing_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder(tmp_path, "sbatch", "1234")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / HOSTILE
    launch = plan_launch(write_launch(tmp_path, str(run_dir)), ["optimizer.lr=2e-3"])
    assert submit(launch) == "1234"
    folder = launch.folder
    assert folder.parent == run_dir / "launches"
    config = load_config(folder / "config.yaml")
    assert (config.model.num_layers, config.optimizer.lr, config.train.run_dir) == (2, 2e-3, str(run_dir))
    assert (folder / "train.sbatch").read_text() == (SCRIPTS / "train.sbatch").read_text()
    for package, source in (("megatron_ultramem", ROOT), ("ultramem_kernels", ROOT / "kernels")):
        for file in (source / package).rglob("*.py"):
            assert (folder / "code" / file.relative_to(source)).read_bytes() == file.read_bytes()
    arguments = recorded(tmp_path, "sbatch")
    assert f"--job-name={HOSTILE}" in arguments and "--gpus-per-node=4" in arguments
    assert arguments[-2:] == [str(folder / "train.sbatch"), str(folder / "config.yaml")]
    environment = recorded(tmp_path, "sbatch", "environment")
    assert f"NCCL_DEBUG={HOSTILE}" in environment and f"ULTRAMEM_CODE={folder / 'code'}" in environment
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("script", ["train", "sweep"])
def test_the_batch_scripts_pass_settings_on_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    for name, prints in (("srun", ""), ("scontrol", "node-1")):
        recorder(tmp_path, name, prints)
    monkeypatch.chdir(tmp_path)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": HOSTILE,
        "SLURM_CPUS_ON_NODE": "16",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_ARRAY_TASK_ID": "2",
        "ULTRAMEM_CODE": HOSTILE,
        "ULTRAMEM_CONTAINER": HOSTILE,
        "ULTRAMEM_MOUNTS": HOSTILE,
    }
    arguments = ["my config; touch pwned.yaml", f"train.run_dir={HOSTILE}", "$(touch pwned) ${HOME}"]
    expected = arguments
    if script == "sweep":
        (tmp_path / "sweep.txt").write_text("train.steps=1\n  train.run_dir=x $(touch pwned) `touch pwned` a;b *\n")
        arguments = [arguments[0], str(tmp_path / "sweep.txt")]
        expected = [arguments[0], "train.run_dir=x", "$(touch", "pwned)", "`touch", "pwned`", "a;b", "*"]
    command = ["bash", str(SCRIPTS / f"{script}.sbatch"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    passed = recorded(tmp_path, "srun")
    assert passed[passed.index("--config") + 1 :] == expected
    assert f"--container-image={HOSTILE}" in passed and f"--container-mounts={HOSTILE}" in passed
    assert "--nnodes=2" in passed and "--nproc-per-node=8" in passed and "--rdzv-endpoint=node-1:20007" in passed
    assert not list(tmp_path.glob("*pwned*"))


def test_a_failed_preflight_ends_the_job_before_it_trains(tmp_path: Path) -> None:
    for name in ("srun", "scontrol"):
        recorder(tmp_path, name, "node-1")
    with (tmp_path / "srun").open("a") as script:
        script.write('[[ " $* " != *" preflight "* ]]\n')
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "node-1",
        "SLURM_CPUS_ON_NODE": "16",
        "ULTRAMEM_RANKS_PER_NODE": "2",
    }
    command = ["bash", str(SCRIPTS / "train.sbatch"), "my.yaml"]
    for preflight, status, ran in (("1", 1, "preflight"), ("0", 0, "train")):
        done = subprocess.run(
            command, capture_output=True, text=True, env=variables | {"ULTRAMEM_PREFLIGHT": preflight}
        )
        assert done.returncode == status, done.stderr
        assert recorded(tmp_path, "srun")[-3:] == [ran, "--config", "my.yaml"]


def test_a_dry_run_checks_and_shows_but_writes_nothing(tmp_path: Path) -> None:
    launch = write_launch(tmp_path, str(tmp_path / "run"), options={"exclusive": True, "qos": "high"})
    command = [sys.executable, str(ROOT / "tools" / "launch_slurm.py"), str(launch), "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert " --exclusive --qos=high " in done.stdout and "sbatch --parsable" in done.stdout
    assert not (tmp_path / "run").exists()


def test_the_example_launch_file_is_legal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tree = yaml.safe_load((SCRIPTS / "launch.yaml").read_text())
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    tree["environment"]["venv"] = str(tmp_path)
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(ROOT)
    launch = plan_launch(tmp_path / "launch.yaml", [])
    assert "--time=1-00:00:00" in launch.command and launch.config.checkpoint.interval == 500


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("job", {"nodez": 2}, "job.nodez: unknown setting; did you mean job.nodes"),
        ("job", {"nodes": 0}, "job.nodes = 0: legal: an integer of at least 1"),
        ("job", {"time": 3600}, "job.time = 3600: .* in quotes"),
        ("job", {"gpus_per_node": 0}, "job.gpus_per_node = 0 needs job.ranks_per_node"),
        ("job", {"options": {"wrap": "touch pwned"}}, "job.options.wrap: legal"),
        ("job", {"options": {"x; touch pwned": 1}}, "job.options.x; touch pwned: legal"),
        ("environment", {"variables": {"WANDB_API_KEY": "x"}}, "environment.variables.WANDB_API_KEY: a secret"),
        ("environment", {"variables": {"A B": "x"}}, "environment.variables.A B: legal"),
        ("environment", {"venv": "/nowhere"}, "environment.venv = /nowhere: has no bin/activate"),
        ("environment", {"mounts": "/a:/a"}, "environment.mounts = '/a:/a' without"),
        ("train", {"overrides": ["optimizer.lr=-1"]}, "optimizer.lr = -1.0: legal"),
        ("train", {"script": "none.sbatch"}, "train.script = none.sbatch: no such file"),
    ],
)
def test_what_is_illegal_is_refused_before_anything_is_written(
    tmp_path: Path, section: str, value: dict[str, object], message: str
) -> None:
    path = write_launch(tmp_path, str(tmp_path / "run"))
    tree = yaml.safe_load(path.read_text())
    tree[section] |= value
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=message):
        plan_launch(path, [])
    assert not (tmp_path / "run").exists()
