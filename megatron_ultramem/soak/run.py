"""The soak: one run without faults, one with, and their comparison."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ultramem.soak import verify
from megatron_ultramem.soak.disk import SmallDisk
from megatron_ultramem.soak.faults import Plan, strike
from megatron_ultramem.soak.job import SAVE_INTERVAL, Job, make_corpus, settings
from megatron_ultramem.training.checkpoint_folder import LATEST

DISK_MIB = 256
POLL_SECONDS = 0.02


@dataclass
class Outcome:
    """What a soak found. It passed if `problems` is empty."""

    seconds: float = 0.0
    steps: int = 0
    faults: list[tuple[Plan, str]] = field(default_factory=list)
    recovery_seconds: list[tuple[str, float]] = field(default_factory=list)  # by kind, to a step beyond all before
    restarts: int = 0
    launches: int = 0
    fallbacks: int = 0  # damaged checkpoints that gave way to the one before
    checkpoints: int = 0  # compared with those of the run without faults
    problems: list[str] = field(default_factory=list)


def soak(
    folder: Path, plans: list[Plan], steps: int, *, async_save: bool, limit_seconds: float, say: Callable[[str], None]
) -> Outcome:
    """Runs both; raises TimeoutError if the one with faults has not ended after `limit_seconds`.

    Args:
        folder: for everything that is written; should be empty.
        plans: the faults; those of a full disk need the right to mount a tmpfs.
    """
    corpus = make_corpus(_new(folder / "corpus"))
    say(f"run without faults: {steps} steps")
    reference = Job(
        settings(corpus, folder / "reference", steps, async_save=async_save),
        folder / "reference",
        folder / "reference.log",
        "reference",
    )
    reference.start()
    while reference.ended() is None:
        time.sleep(0.2)
    if reference.ended():
        raise RuntimeError(f"the run without faults failed: see {reference.log}")

    outcome = Outcome(steps=steps)
    began = time.monotonic()
    needs_disk = any(plan.kind == "full_disk" for plan in plans)
    with SmallDisk(folder / "disk", DISK_MIB) if needs_disk else contextlib.nullcontext() as disk:
        run_dir = _new(folder / "disk") / "run"
        job = Job(
            settings(corpus, run_dir, steps, async_save=async_save), run_dir, folder / "soak.log", f"soak-{began}"
        )
        try:
            _run_under_faults(job, plans, disk, began + limit_seconds, outcome, say)
        finally:
            job.kill()
        outcome.seconds = time.monotonic() - began
        _compare(job, reference, outcome, say)
    return outcome


def _run_under_faults(
    job: Job, plans: list[Plan], disk: SmallDisk | None, deadline: float, outcome: Outcome, say: Callable[[str], None]
) -> None:
    waiting, seen, furthest = list(plans), set(), 0
    last_strike, unrecovered = time.monotonic(), list[tuple[str, float, int]]()
    job.start()
    while (code := job.ended()) != 0:
        now = time.monotonic()
        if now > deadline:
            raise TimeoutError(f"step {furthest} after {len(outcome.faults)} faults: see {job.log}")
        if code is not None:
            say(f"the launcher ended with {code} and is started again")
            job.start()
        furthest = max(furthest, job.step())
        for kind, when, step in list(unrecovered):
            if furthest > step:
                outcome.recovery_seconds.append((kind, now - when))
                unrecovered.remove((kind, when, step))
        seen |= {path.name for path in job.saved()}
        _check_latest(job, outcome)
        if waiting and _is_due(waiting[0], furthest, now - last_strike):
            fault = waiting.pop(0)
            if fault.step is not None:
                time.sleep(fault.delay)
            done = strike(job, fault, disk)
            last_strike = time.monotonic()
            outcome.faults.append((fault, done))
            # Beyond the step that may have been under way, and finished, when it struck.
            unrecovered.append((fault.kind, last_strike, max(furthest, job.step()) + 1))
            say(f"[{len(outcome.faults)}/{len(plans)}] step {furthest}: {fault.kind}: {done}")
        time.sleep(POLL_SECONDS)
    outcome.launches = job.starts
    log = job.log.read_text(errors="replace")
    outcome.restarts = len(re.findall(r"^restart \d+: ", log, re.MULTILINE))
    outcome.fallbacks = len(re.findall(r"is taken instead$", log, re.MULTILINE))
    if waiting:
        outcome.problems.append(f"the run ended before {len(waiting)} of the faults")
    if lost := seen - {path.name for path in job.saved()}:
        outcome.problems.append(f"checkpoints were lost: {', '.join(sorted(lost))}")
    time.sleep(3.0)
    if left := job.processes():
        outcome.problems.append(f"processes were left behind: {'; '.join(' '.join(p.cmdline())[:120] for p in left)}")


def _is_due(fault: Plan, furthest: int, since_last: float) -> bool:
    return since_last >= fault.delay if fault.step is None else furthest >= fault.step


def _check_latest(job: Job, outcome: Outcome) -> None:
    link = job.checkpoints / LATEST
    target = link.resolve()
    if link.is_symlink() and not (target / "SHA256SUMS").is_file() and link.resolve() == target:  # it did not move on
        outcome.problems.append(f"latest led to {target.name}, which is not a whole checkpoint")


def _compare(job: Job, reference: Job, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Every checkpoint of the run without faults must be there, undamaged, and equal to it by every bit."""
    expected = {path.name: path for path in reference.saved()}
    found = {path.name: path for path in job.saved()}
    wanted = {f"step_{step:08d}" for step in (*range(SAVE_INTERVAL, outcome.steps, SAVE_INTERVAL), outcome.steps)}
    if expected.keys() != wanted:
        outcome.problems.append(f"the run without faults saved {sorted(expected)}")
    if not found or job.step() != outcome.steps:
        outcome.problems.append(f"the run with faults ended at step {job.step()} of {outcome.steps}")
    for name, path in sorted(expected.items()):
        if name not in found:
            outcome.problems.append(f"{name} is missing")
        elif damage := verify.damage(found[name]):
            outcome.problems.append(f"{name} is damaged: {damage}")
        elif different := verify.differences(found[name], path):
            outcome.problems.append(f"{name} differs in {len(different)} tensors, as {different[0]}")
        else:
            outcome.checkpoints += 1
    latest = (job.checkpoints / LATEST).resolve()
    if found and latest != list(found.values())[-1].resolve():
        outcome.problems.append(f"latest leads to {latest.name}")
    say(f"{outcome.checkpoints} of {len(expected)} checkpoints are equal to those of the run without faults")


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
