"""A real SLURM of one node, with its own munge daemon, configuration, ports and folder; ended without a trace."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.distributed.workers import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo", "srun")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
SchedulerParameters=sched_interval=5
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Those of SLURM's and munge's programs that this machine lacks."""
    return [name for name in PROGRAMS if _path(name) is None]


class Cluster:
    """Daemons that run from construction to `close`; raises RuntimeError, with their logs, if they do not come up."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not pytest's: a socket's path may have 107 characters
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        self._daemons: list[subprocess.Popen[bytes]] = []
        configuration = self.folder / "slurm.conf"
        configuration.write_text(
            CONFIGURATION.format(
                controller_port=free_port(), node_port=free_port(), folder=self.folder, user=getpass.getuser()
            )
        )
        self.environment = {**os.environ, "SLURM_CONF": str(configuration)}
        try:
            self._start_munge()
            self._start("slurmctld", "-D", "-i", "-f", str(configuration))
            self._start("slurmd", "-D", "-N", "localhost", "-f", str(configuration))
            self._wait(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%T", check=False), "an idle node")
        except BaseException:
            self.close()
            raise

    def run(self, *command: str, check: bool = True, environment: Mapping[str, str] | None = None) -> str:
        """What a command of SLURM prints."""
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=self.environment | dict(environment or {})
        )
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.stderr}")
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`, such as JobState, Restarts and ExitCode."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_for_state(self, job: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """The job's fields once it is in one of these states."""
        self._wait(lambda: self.job(job)["JobState"] in states, f"job {job} to be {' or '.join(states)}", seconds)
        return self.job(job)

    def close(self) -> None:
        """Ends all jobs and daemons, and deletes the folder."""
        if len(self._daemons) == 3:
            self.run("scancel", "--full", f"--user={getpass.getuser()}", check=False)
            deadline = time.monotonic() + 20
            while self.run("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        socket = self.folder / "munge.socket"
        files = [f"--{name}={self.folder}/munge.{name.removesuffix('-file')}" for name in ("log-file", "pid-file")]
        seed = f"--seed-file={self.folder}/munge.seed"
        self._start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket}", seed, *files)
        self._wait(socket.exists, "munge's socket")

    def _start(self, program: str, *arguments: str) -> None:
        path = _path(program)
        assert path is not None
        with (self.folder / f"{program}.out").open("wb") as log:
            self._daemons.append(
                subprocess.Popen([path, *arguments], stdout=log, stderr=log, env=self.environment, cwd=self.folder)
            )

    def _wait(self, ready: Callable[[], bool], what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in self.folder.glob("*.out"))
                raise RuntimeError(f"waited for {what} for {seconds:.0f} s; ended: {ended}\n{logs}")
            time.sleep(0.3)


def _path(program: str) -> str | None:
    """Daemons lie where an ordinary user's PATH does not look."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
