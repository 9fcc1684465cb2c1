"""Jobs of several ranks side by side on one machine, each on places (GPUs) of its own.

Places are dealt out beforehand; of the jobs that want a place the earlier one goes first. The ranks of a job are
started a turn early, so that they import while their places are still in use, and then wait (`wait_for_turn`). Ranks
find each other as under torchrun, whose agent is not needed: a job that fails is not restarted.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.1
GRACE_SECONDS = 3.0  # for the other ranks, after one has failed, to say why
SHOWN_LINES = 25  # of what a job that failed has printed
# What torch's C++ says when other ranks are gone, and from where in it.
NOISE = re.compile(r"(\[rank\d+\]:)?\[[IW]\d{4} |Exception raised from |frame #\d+: ")
ERROR = re.compile(r"(\[rank\d+\]:\s*)?([\w.]*Error|error)\b")


@dataclass(eq=False)
class Job:
    """One command on several ranks, which must call `wait_for_turn` before they use a GPU.

    `log`: file for what the ranks print. `environment`: variables beside those that tell ranks apart.
    """

    name: str
    command: list[str]
    ranks: int
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    places: tuple[int, ...] = ()
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _began: float = 0.0
    _failed: float | None = None

    def start(self, places: Sequence[str] | None) -> None:
        """The ranks, as far as `wait_for_turn`. `places`: names of all GPUs of the machine; None: there are none."""
        if self._processes:
            return
        own = {} if places is None else {"CUDA_VISIBLE_DEVICES": ",".join(places[place] for place in self.places)}
        with self.log.open("ab") as log:
            for rank in range(self.ranks):
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks}
                environment = {**os.environ, **self.environment, **own, "MASTER_ADDR": "127.0.0.1"}
                environment |= {name: str(value) for name, value in ranks.items()}
                streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log}
                process = subprocess.Popen(self.command, env=environment, start_new_session=True, **streams)
                self._processes.append(process)

    def go(self) -> None:
        """It is the job's turn."""
        self._began = time.monotonic()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has ended already
                process.stdin.write(f"{port}\n".encode())
                process.stdin.close()

    @property
    def began(self) -> bool:
        return self._began > 0

    def outcome(self, seconds: float) -> str | None:
        """None while it goes on; '' if it is done; otherwise what went wrong, and then its ranks have been ended.

        `seconds`: that it may take from its turn on.
        """
        codes = [process.poll() for process in self._processes]
        now = time.monotonic()
        if None not in codes:
            self.end()
            return "failed" if any(codes) else ""
        if any(codes):
            self._failed = self._failed or now
            if now - self._failed > GRACE_SECONDS:
                self.end()
                return "failed"
        if now - self._began > seconds:
            self.end()
            return f"took more than {seconds:g} s"
        return None

    def end(self) -> None:
        """Ends its ranks and what they have started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def last_words(self) -> str:
        """The end of what its ranks have printed, and before it their first error if that is further up."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines = [line for line in text.splitlines() if line.strip() and not NOISE.match(line)]
        earlier, last = lines[:-SHOWN_LINES], lines[-SHOWN_LINES:]
        first = next((line for line in earlier if ERROR.match(line)), None)
        return "\n".join(last if first is None else [first, "...", *last])


def wait_for_turn() -> None:
    """In a rank of a job: until its places are free. Ends the process if whoever started it is gone."""
    port = sys.stdin.readline().strip()
    if not port:
        raise SystemExit(1)
    os.environ["MASTER_PORT"] = port


def gpu_names(count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the `count` GPUs that this process sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(count)]


def dealt(ranks: Sequence[int], places: int) -> list[tuple[int, tuple[int, ...]]]:
    """(job, its places) for jobs of so many ranks, none more than `places`, most important first: each gets the first
    places free in a round of as many jobs as there is room for, and less important ones fill what a round leaves over.
    """
    left, found = list(range(len(ranks))), []
    while left:
        used = 0
        for job in list(left):
            if used + ranks[job] <= places:
                found.append((job, tuple(range(used, used + ranks[job]))))
                used += ranks[job]
                left.remove(job)
    return found


def run_jobs(
    jobs: Sequence[Job],
    gpus: Sequence[str] | None,
    *,
    seconds: float,
    job_seconds: float,
    ended: Callable[[Job, str], None],
) -> None:
    """Runs jobs that have their places, in this order on each place.

    Args:
        gpus: names of the GPUs; None: places are processors, and nothing is hidden from a job.
        seconds: for all of them; jobs that go on then are ended.
        job_seconds: for each, from its turn on.
        ended: called with every job that ended, and with '' or why it has no result.
    """
    waiting, running = list(jobs), list[Job]()
    deadline = time.monotonic() + seconds
    try:
        while (waiting or running) and time.monotonic() < deadline:
            for job in _first(waiting, running):
                job.start(gpus)
                job.go()
                waiting.remove(job)
                running.append(job)
            for job in _first(waiting, []):
                job.start(gpus)
            for job in list(running):
                outcome = job.outcome(job_seconds)
                if outcome is not None:
                    running.remove(job)
                    ended(job, outcome)
            time.sleep(POLL_SECONDS)
    finally:
        for job in (*running, *waiting):
            job.end()
    for job in running:
        ended(job, f"was ended after {seconds:g} s in all")
    for job in waiting:
        ended(job, "was not begun: no time left")


def _first(waiting: Sequence[Job], running: Sequence[Job]) -> Iterator[Job]:
    """The jobs that nobody before them keeps from their places."""
    taken = {place for job in running for place in job.places}
    for job in list(waiting):
        if taken.isdisjoint(job.places):
            yield job
        taken.update(job.places)
