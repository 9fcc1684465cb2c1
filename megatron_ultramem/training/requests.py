"""What a running job is asked to do from outside: by a signal to any rank, or by a file in the run folder.

    SIGUSR1                     finish the step, save, end with status 0: a time limit or a preemption is near
    SIGTERM                     the same, with status 143: whoever waits for the job must not take it for finished
    touch <run_dir>/profile     record the next steps (logging.profile_*); the file goes away when it has been seen
    touch <run_dir>/memory      the same, with the allocator's history of them

A request reaches one rank at one moment, and all ranks must follow it after the same step. So each rank's requests
travel with the loss of the step, in the one all-reduce that is there anyway.

SIGUSR1 is blocked and asked for once a step, never delivered: nothing is interrupted, it is not lost while the run is
still being set up, and it does not end the processes that a rank starts, which inherit the blocking: schedulers signal
every process of a job. SIGTERM comes to all of them too (torchrun's agent signals the rank's process group). It has a
handler, which forked writers of checkpoints inherit, so that they finish; data workers ignore it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP, TERMINATE, PROFILE, MEMORY = range(4)
_KINDS = 4
PROFILE_FILE, MEMORY_FILE = "profile", "memory"


def hold_back_stop_signal() -> None:
    """Blocks SIGUSR1 in this thread, those it starts, and their processes. To be called before there are threads."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


class Requests:
    """The requests that all ranks have agreed on. Hears of none outside `listening`."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._seen = [False] * _KINDS
        self.agreed = [False] * _KINDS

    @contextmanager
    def listening(self, folder: Path | None) -> Iterator[None]:
        """Within it, signals to this rank count, and files in `folder` (of the run; None on all ranks but one)."""
        hold_back_stop_signal()
        self._folder = folder

        def terminate(number: int, frame: FrameType | None) -> None:
            self._seen[TERMINATE] = True

        before = signal.signal(signal.SIGTERM, terminate)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            self._folder = None

    def flags(self) -> list[float]:
        """1.0 for each kind of request that this rank has heard of, else 0.0: to be summed over ranks."""
        if signal.SIGUSR1 in signal.sigpending():
            self._seen[STOP] = signal.sigwait({signal.SIGUSR1}) == signal.SIGUSR1
        if self._folder is not None:
            self._seen[PROFILE] |= (self._folder / PROFILE_FILE).exists()
            self._seen[MEMORY] |= (self._folder / MEMORY_FILE).exists()
        return [float(seen) for seen in self._seen]

    def agree(self, sums: Sequence[float]) -> None:
        """Takes the sums over ranks of `flags`; those above 0 are agreed."""
        self.agreed = [total > 0 for total in sums]
        for kind, name in ((PROFILE, PROFILE_FILE), (MEMORY, MEMORY_FILE)):
            if self.agreed[kind] and self._folder is not None:
                (self._folder / name).unlink(missing_ok=True)
            self._seen[kind] = False

    @property
    def stop(self) -> bool:
        """Whether the run is to save and end now."""
        return self.agreed[STOP] or self.agreed[TERMINATE]

    @property
    def exit_status(self) -> int:
        """Of a run that ends now: 143 if it was terminated, else 0."""
        return 128 + signal.SIGTERM if self.agreed[TERMINATE] else 0

    @property
    def reason(self) -> str:
        """Why the run stops, in a word."""
        return "SIGTERM" if self.agreed[TERMINATE] else "SIGUSR1"
