"""Whether this process belongs to a launch that was restarted, and which launch that is.

torchrun's agent restarts all ranks in place when one fails (`--max-restarts`), and SLURM requeues a job under its old
number. What the settings say of the start (`checkpoint.load`) was meant for the first time alone: a restarted run goes
on from the newest checkpoint that the same launch saved.
"""

from __future__ import annotations

import os

import psutil


def restart_count() -> int:
    """How often torchrun's agent has restarted the ranks of this launch in place."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def is_restart() -> bool:
    """Whether this launch has run before: restarted in place, or requeued by SLURM."""
    return restart_count() > 0 or int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def launch_id() -> str:
    """Identifies the launch through all its restarts, on rank 0; empty without a launcher that restarts.

    The number of a SLURM job, or torchrun's run id with the time at which its agent started: the id alone may be the
    same for several launches.
    """
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"slurm-{job}"
    if run_id := os.environ.get("TORCHELASTIC_RUN_ID"):
        return f"{run_id}-{psutil.Process(os.getppid()).create_time():.0f}"
    return ""
