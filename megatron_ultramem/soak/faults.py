"""The faults of a soak, chosen by a seeded generator and done to a job."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_ultramem.soak.disk import SmallDisk
from megatron_ultramem.soak.job import Job

KINDS = ("kill", "kill_while_saving", "terminate", "stop", "full_disk", "truncate")


@dataclass(frozen=True)
class Plan:
    """One fault to come."""

    kind: str
    step: int | None  # when the run first reaches this step; None: `delay` seconds after the fault before
    delay: float  # seconds
    draw: int  # seed of what is left to chance within it


def plan(seed: int, count: int, steps: int, kinds: tuple[str, ...] = KINDS) -> list[Plan]:
    """Faults in their order: every kind equally often, at random steps; some follow the one before while the run starts
    again."""
    generator = random.Random(seed)
    chosen = [kinds[number % len(kinds)] for number in range(count)]
    generator.shuffle(chosen)
    at = sorted(generator.randrange(2, steps - 3) for _ in range(count))
    plans = []
    for number, kind in enumerate(chosen):
        follows = number > 0 and generator.random() < 0.25
        delay = generator.uniform(0.0, 12.0 if follows else 0.3)
        plans.append(Plan(kind, None if follows else at[number], delay, generator.randrange(2**31)))
    return plans


def strike(job: Job, fault: Plan, disk: SmallDisk | None) -> str:
    """Does it; returns what was done, in words. Does nothing if the job has just ended."""
    return _ACTIONS[fault.kind](job, random.Random(fault.draw), disk)


def _signal(job: Job, chance: random.Random, number: signal.Signals) -> str:
    ranks = job.ranks()
    if not ranks:  # between two starts
        time.sleep(1.0)
        ranks = job.ranks()
    if not ranks:
        return "no rank was there"
    rank = chance.choice(sorted(ranks))
    try:
        os.kill(ranks[rank], number)
    except ProcessLookupError:
        return f"rank {rank} had just ended"
    return f"{number.name} to rank {rank}"


def _kill(job: Job, chance: random.Random, disk: SmallDisk | None) -> str:
    return _signal(job, chance, signal.SIGKILL)


def _terminate(job: Job, chance: random.Random, disk: SmallDisk | None) -> str:
    return _signal(job, chance, signal.SIGTERM)


def _stop(job: Job, chance: random.Random, disk: SmallDisk | None) -> str:
    return _signal(job, chance, signal.SIGSTOP)


def _kill_while_saving(job: Job, chance: random.Random, disk: SmallDisk | None) -> str:
    until, seen = time.monotonic() + 120, {path.name for path in job.checkpoints.glob(".saving-*")}
    while time.monotonic() < until and job.ended() is None:
        drafts = [path.name for path in job.checkpoints.glob(".saving-*") if path.name not in seen]
        if drafts:
            time.sleep(chance.choice([0.0, chance.uniform(0.0, 0.1), chance.uniform(0.0, 0.5)]))
            return f"{_signal(job, chance, signal.SIGKILL)} while {drafts[0]} was written"
        time.sleep(0.002)
    return "no save began"


def _full_disk(job: Job, chance: random.Random, disk: SmallDisk | None) -> str:
    assert disk is not None
    seconds = chance.uniform(1.0, 10.0)
    disk.fill(seconds)
    return f"disk full for {seconds:.1f} s"


def _truncate(job: Job, chance: random.Random, disk: SmallDisk | None) -> str:
    done = _kill(job, chance, disk)  # first, lest a newer checkpoint hides the damage
    saved = job.saved()
    if len(saved) < 2:
        return f"{done}; no two checkpoints to truncate one of"
    path = chance.choice(sorted(path for path in saved[-1].iterdir() if path.stat().st_size))
    size = path.stat().st_size
    os.truncate(path, chance.randrange(size))
    return f"{done}, then {saved[-1].name}/{path.name} cut to {path.stat().st_size} of {size} bytes"


_ACTIONS: dict[str, Callable[[Job, random.Random, SmallDisk | None], str]] = {
    "kill": _kill,
    "kill_while_saving": _kill_while_saving,
    "terminate": _terminate,
    "stop": _stop,
    "full_disk": _full_disk,
    "truncate": _truncate,
}
