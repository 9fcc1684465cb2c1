"""Submits a training run to SLURM: a YAML file becomes one sbatch command and a snapshot in the run folder.

    <run_dir>/launches/20260102T030405Z/
        launch.yaml      what was asked for
        config.yaml      the resolved settings of the run
        train.sbatch     the script that was submitted
        code/            the packages, imported by the job whatever happens to the checkout; revision.txt: its commit
        command.txt      the sbatch command
        slurm-N.log      output of job N

No value of the YAML file is ever part of a shell command: sbatch is called with a list of arguments, the script gets
the path of config.yaml as an argument and the rest as environment variables.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import yaml

from megatron_ultramem.config.load import load_config, read_yaml, resolve, save_config
from megatron_ultramem.config.schema import Config, setting
from megatron_ultramem.errors import ConfigError, LaunchError
from megatron_ultramem.redaction import is_secret_name, refuse_secrets

SCRIPT = "train.sbatch"
_PACKAGES = ("megatron_ultramem", "ultramem_kernels")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
# The script relies on its own values of these.
_RESERVED = ("wrap", "export", "export-file", "ntasks-per-node", "parsable", "chdir", "array")


@dataclass
class JobConfig:
    """What is asked of SLURM."""

    name: str = setting("ultramem", "Name of the job.")
    nodes: int = setting(1, "Nodes.", minimum=1)
    gpus_per_node: int = setting(8, "GPUs on each; 0: a CPU run, of ranks_per_node ranks.", minimum=0)
    ranks_per_node: Optional[int] = setting(None, "Ranks on each node; null: one per GPU.", minimum=1)
    time: Optional[str] = setting(None, "Time limit in quotes, as '1-00:00:00'; null: the partition's.")
    partition: Optional[str] = setting(None, "Partition; null: SLURM's default.")
    account: Optional[str] = setting(None, "Account to charge; null: SLURM's default.")
    signal_seconds: int = setting(
        120, "Seconds before the limit at which the run is told to save and stop; 20 of them are kept back.", minimum=30
    )
    options: dict[str, Any] = setting({}, "Other long options of sbatch; true: one without a value.")


@dataclass
class EnvironmentConfig:
    """The software that the job runs in."""

    venv: Optional[str] = setting(None, "Virtual environment to activate.")
    container: Optional[str] = setting(None, "Container image (Pyxis) instead of a virtual environment.")
    mounts: Optional[str] = setting(None, "Mounts of the container, as in /scratch:/scratch,/data:/data.")
    variables: dict[str, str] = setting({}, "Environment variables; not for secrets.")


@dataclass
class RunConfig:
    """The run."""

    config: Optional[str] = setting(None, "YAML file of settings.")
    overrides: list[str] = setting([], "section.setting=value, on top of that file.")
    script: str = setting(f"examples/slurm/{SCRIPT}", "The batch script.")


@dataclass
class LaunchConfig:
    """A launch file."""

    job: JobConfig = field(default_factory=JobConfig, metadata={"help": "What is asked of SLURM."})
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig, metadata={"help": "Software."})
    train: RunConfig = field(default_factory=RunConfig, metadata={"help": "The run."})


@dataclass(frozen=True)
class Launch:
    """A checked launch: what would be submitted."""

    request: LaunchConfig
    config: Config
    folder: Path  # of the snapshot
    command: list[str]  # sbatch and its arguments
    variables: dict[str, str]  # added to the environment of sbatch, which passes it on

    def shown(self) -> str:
        """The command as one could type it."""
        return shlex.join([*(f"{name}={value}" for name, value in self.variables.items()), *self.command])


def plan_launch(path: str | Path, overrides: list[str]) -> Launch:
    """Reads and checks a launch file; writes nothing. `overrides` come after those of the file.

    Raises ConfigError for anything illegal in it or in the run's own settings.
    """
    tree = read_yaml(Path(path))
    _refuse_numbers_as_time(tree)
    request = resolve(tree, LaunchConfig)
    refuse_secrets(request)
    _check(request)
    config = load_config(request.train.config, [*request.train.overrides, *overrides])
    refuse_secrets(config)
    name = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    folder = Path(config.train.run_dir).absolute() / "launches" / name
    variables = _variables(request, folder)
    command = [
        "sbatch",
        "--parsable",
        *_options(request.job, folder),
        str(folder / SCRIPT),
        str(folder / "config.yaml"),
    ]
    return Launch(request, config, folder, command, variables)


def submit(launch: Launch) -> str:
    """Writes the snapshot and submits the job; returns its number. Raises LaunchError if either fails."""
    try:
        _write_snapshot(launch)
    except OSError as error:
        raise LaunchError(f"the snapshot {launch.folder} cannot be written: {error}") from error
    if shutil.which("sbatch") is None:
        raise LaunchError("sbatch was not found: submit from a machine where SLURM's commands are installed")
    done = subprocess.run(launch.command, capture_output=True, text=True, env={**os.environ, **launch.variables})
    if done.returncode:
        raise LaunchError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]  # on several clusters: number;cluster


def _refuse_numbers_as_time(tree: dict[str, Any]) -> None:
    job = tree.get("job")
    limit = job.get("time") if isinstance(job, dict) else None
    if limit is not None and not isinstance(limit, str):
        raise ConfigError(f"job.time = {limit!r}: YAML reads 1:00:00 as a number of seconds; legal: text in quotes")


def _check(request: LaunchConfig) -> None:
    job, environment = request.job, request.environment
    if job.gpus_per_node == 0 and job.ranks_per_node is None:
        raise ConfigError("job.gpus_per_node = 0 needs job.ranks_per_node: the ranks on each node")
    if environment.venv is not None and environment.container is not None:
        raise ConfigError("environment.venv and environment.container are both set; legal: one of the two")
    if environment.mounts is not None and environment.container is None:
        raise ConfigError(f"environment.mounts = {environment.mounts!r} without environment.container; legal: null")
    if environment.venv is not None and not (Path(environment.venv) / "bin" / "activate").is_file():
        raise ConfigError(f"environment.venv = {environment.venv}: has no bin/activate; legal: a virtual environment")
    for name in environment.variables:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(f"environment.variables.{name}: legal: names of letters, digits and _")
        if is_secret_name(name):
            raise ConfigError(
                f"environment.variables.{name}: a secret would be saved in the run folder; legal: leave it in the "
                "environment that you submit from, which sbatch passes on"
            )
    for name in job.options:
        if not _OPTION.fullmatch(name) or name in _RESERVED:
            raise ConfigError(
                f"job.options.{name}: legal: long options of sbatch without the dashes, but for {', '.join(_RESERVED)}"
            )
    if not Path(request.train.script).is_file():
        raise ConfigError(f"train.script = {request.train.script}: no such file; legal: a batch script")


def _options(job: JobConfig, folder: Path) -> list[str]:
    log = str(folder).replace("%", "%%") + "/slurm-%j.log"  # sbatch has patterns of its own in file names
    options: dict[str, Any] = {
        "job-name": job.name,
        "nodes": job.nodes,
        "gpus-per-node": job.gpus_per_node or None,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "signal": f"B:USR1@{job.signal_seconds}",
        "output": log,
        "export": "ALL",
        **job.options,
    }
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in options.items()
        if value is not None and value is not False
    ]


def _variables(request: LaunchConfig, folder: Path) -> dict[str, str]:
    environment = request.environment
    found = {
        **environment.variables,
        "ULTRAMEM_CODE": str(folder / "code"),
        "ULTRAMEM_GRACE_SECONDS": str(request.job.signal_seconds - 20),
        "ULTRAMEM_RANKS_PER_NODE": request.job.ranks_per_node,
        "ULTRAMEM_VENV": str(Path(environment.venv).absolute()) if environment.venv else None,
        "ULTRAMEM_CONTAINER": environment.container,
        "ULTRAMEM_MOUNTS": environment.mounts,
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _write_snapshot(launch: Launch) -> None:
    folder = launch.folder
    folder.mkdir(parents=True)
    save_config(launch.config, folder / "config.yaml")
    (folder / "launch.yaml").write_text(yaml.safe_dump(asdict(launch.request), sort_keys=False))
    (folder / "command.txt").write_text(launch.shown() + "\n")
    shutil.copy(launch.request.train.script, folder / SCRIPT)
    for package in _PACKAGES:
        source = _package_folder(package)
        shutil.copytree(source, folder / "code" / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (folder / "code" / "revision.txt").write_text(_revision(_package_folder(_PACKAGES[0])))


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LaunchError(f"the package {package} was not found: install this project, or set PYTHONPATH")
    return Path(spec.submodule_search_locations[0])


def _revision(folder: Path) -> str:
    """The commit of a checkout and what was changed in it since; empty outside one."""
    parts = []
    for command in (["rev-parse", "HEAD"], ["status", "--short"], ["diff", "HEAD"]):
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, errors="replace")
        parts.append(done.stdout if done.returncode == 0 else "")
    return "".join(parts)
