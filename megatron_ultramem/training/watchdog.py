"""Finds ranks that are gone, stopped or hang, within a bounded time, says which, and ends the run.

Every rank has a thread that leaves a sign of life in the launcher's store and looks at three things: the signs of the
next rank (a ring, so that one look costs the same on any number of ranks), how long its own main thread has been in the
same place, and whether another rank has declared a fault. Who finds one declares it; the first to do so reports it,
every rank leaves its stacks and its record of collectives in <run_dir>/faults, and all end with exit code 4, whatever
their main threads wait for. A rank that was killed is noticed sooner, by a collective that fails: one of the survivors
then names it. Errors that a run ends in (a NaN, a file that cannot be written) are reported in the same place.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import psutil
import torch

from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import LostRankError, lost_another_rank
from megatron_ultramem.redaction import redact
from megatron_ultramem.training import flight_recorder
from megatron_ultramem.training.heartbeat import ENDED, Sign, SignBoard, connect_store
from megatron_ultramem.training.restarts import restart_count

logger = logging.getLogger(__name__)

EXIT_CODE = 4
FAULTS_FILE, FAULTS_FOLDER = "faults.jsonl", "faults"  # in the run folder
SHOWN = 8  # ranks that a message names


class Watchdog:
    """Use as a context; begins to watch with `start`, and says of an error that comes from a lost rank which one."""

    def __init__(self, config: Config) -> None:
        self.run_dir = Path(config.train.run_dir)
        self.enabled = config.faults.watchdog
        self.interval = config.faults.heartbeat_seconds
        self.silence = config.faults.silent_seconds
        self.stillness = 60 * (config.faults.hang_minutes or config.parallel.timeout_minutes)
        self.rank = self.ranks = 0
        self._board: SignBoard | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._step: int | None = None
        self._doing, self._moved, self._beat = "setting up", time.monotonic(), 0

    def start(self) -> None:
        """Begins to watch. Collective over the default group."""
        if not self.enabled:
            return
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        token: list[Any] = [secrets.token_hex(8)]
        torch.distributed.broadcast_object_list(token, src=0)
        store = connect_store()
        self._board = SignBoard(store, token[0]) if store is not None else None
        self._moved = time.monotonic()
        self._post()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def progress(self, step: int, doing: str) -> None:
        """The main thread got somewhere."""
        self._step, self._doing, self._moved = step, doing, time.monotonic()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._thread is None:
            return
        try:
            if error is None:
                torch.distributed.barrier()  # the store may end with rank 0
            elif lost_another_rank(error):
                if lost := self._name_lost_ranks(error):
                    raise LostRankError(lost) from error
            elif self._ends_training(error):
                self._record("error", f"{self.sign()}: {type(error).__name__}: {error}", [self.sign()])
        finally:
            self._stop(ENDED if error is None else f"{ENDED}: {type(error).__name__}")

    def _ends_training(self, error: BaseException) -> bool:
        """Whether it is an error for this rank to report; those before the first step are the user's to read."""
        alike = getattr(error, "on_every_rank", False)
        return isinstance(error, Exception) and self._step is not None and (self.rank == 0 or not alike)

    def _stop(self, how: str) -> None:
        """Ends the watch; a last sign tells the other ranks that this one is not lost."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._thread, self._doing = None, how
        with contextlib.suppress(RuntimeError):  # the store went first
            self._post()

    def sign(self) -> Sign:
        """This rank's sign of life."""
        last = flight_recorder.last_collective()
        return Sign(
            self.rank,
            socket.gethostname(),
            os.getpid(),
            self._beat,
            self._step,
            self._doing,
            round(time.monotonic() - self._moved, 1),
            None if last is None else str(last),
            last is not None and not last.done,
        )

    def _watch(self) -> None:
        neighbour, seen = None, time.monotonic()
        while not self._stopping.wait(self.interval):
            try:
                self._post()
                if self._step is not None and time.monotonic() - self._moved > self.stillness:
                    self._end_run("hang", self._describe_hang)
                if self._board is None or self.ranks == 1:
                    continue
                if self._board.declared("fault"):
                    self._leave()
                sign = self._board.read((self.rank + 1) % self.ranks)
                if sign is None or sign != neighbour or sign.has_ended:
                    neighbour, seen = sign, time.monotonic()
                elif time.monotonic() - seen > self.silence:
                    self._end_run("silent", partial(self._describe_silence, sign, seen))
            except RuntimeError as error:  # of the store
                if self._stopping.is_set():
                    return
                self._say(f"the launcher's store is gone, and its host with it: {_line(error)}")
                self._leave()

    def _post(self) -> None:
        self._beat += 1
        if self._board is not None:
            self._board.post(self.sign())

    def _end_run(self, kind: str, describe: Callable[[], tuple[str, list[Sign]]]) -> None:
        """Declares a fault; reports it if no other rank has; ends this rank."""
        if self._board is None or self._board.declare("fault", self.rank):
            text, ranks = describe()
            self._say(text)
            self._record(kind, text, ranks)
            time.sleep(2 * self.interval)  # the launcher ends the others when the first one ends
        self._leave()

    def _describe_silence(self, lost: Sign, since: float) -> tuple[str, list[Sign]]:
        seconds = time.monotonic() - since
        return f"{lost}: no sign of life for {seconds:.0f} s, so it was stopped or its host is lost", [lost]

    def _describe_hang(self) -> tuple[str, list[Sign]]:
        """Names the ranks outside a collective in which others wait, where there are both; else all."""
        signs = [sign for sign in self._signs() if not sign.has_ended]
        waiting = [sign for sign in signs if sign.waiting]
        outside = [sign for sign in signs if not sign.waiting]
        hanging = outside if waiting and outside else signs
        text = "; ".join(str(sign) for sign in hanging[:SHOWN])
        text += f": no progress for {time.monotonic() - self._moved:.0f} s"
        if hanging is outside and waiting:
            collectives = {sign.collective for sign in waiting}
            for collective in sorted(map(str, collectives)):
                ranks = [str(sign.rank) for sign in waiting if str(sign.collective) == collective]
                text += f"; in {collective} wait ranks {', '.join(ranks[:SHOWN])}"
                text += f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
        return text, hanging

    def _name_lost_ranks(self, error: BaseException) -> str | None:
        """The message for an error that comes from another rank's end; None if that rank, or a third one, says why.

        One rank finds out. It has a few seconds: the launcher ends the others as soon as it learns of the first.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._board is None or self._board.declared("fault") or not self._board.declare("loss", self.rank):
            return None
        lost = self._lost_ranks()
        if not lost:
            return None
        text = "; ".join(str(sign) for sign in lost[:SHOWN]) + ": ended without a word after this, as when killed"
        text += f"; noticed by {self.sign()}: {_line(error)}"
        self._record("lost", text, lost)
        return text

    def _lost_ranks(self) -> list[Sign]:
        """Ranks of this host whose process is gone, and ranks elsewhere that leave no more signs; none if a rank ended
        with an error of its own."""
        before = [sign for sign in self._signs() if sign.rank != self.rank]
        if any(sign.has_ended for sign in before):
            return []
        gone = [sign for sign in before if sign.host == socket.gethostname() and not _runs(sign.pid)]
        if not gone:
            time.sleep(2 * self.interval + 0.5)
            after = self._signs()
            gone = [sign for sign in before if sign in after]
        return gone

    def _signs(self) -> list[Sign]:
        """Of all ranks that have left one, this rank's own as of now."""
        others = [self._board.read(rank) for rank in range(self.ranks) if rank != self.rank] if self._board else []
        return sorted([self.sign(), *(sign for sign in others if sign is not None)], key=lambda sign: sign.rank)

    def _record(self, kind: str, text: str, ranks: list[Sign]) -> None:
        """Adds a line to <run_dir>/faults.jsonl."""
        line = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "kind": kind,
            "restart": restart_count(),
            "reported_by": self.rank,
            "ranks": [vars(sign) for sign in ranks],
            "text": redact(text),
        }
        try:
            with (self.run_dir / FAULTS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._say(f"{FAULTS_FILE} cannot be written: {error}")

    def _say(self, text: str) -> None:
        logger.error("error [rank %d]: %s", self.rank, text)

    def _leave_behind(self) -> None:
        """What this rank is doing: the stacks of its threads, and the flight recorder's list of collectives."""
        folder = self.run_dir / FAULTS_FOLDER
        name = f"restart_{restart_count()}_rank_{self.rank:05d}"
        try:
            folder.mkdir(exist_ok=True)
            with (folder / f"{name}.stacks").open("w") as file:
                faulthandler.dump_traceback(file)
            (folder / f"{name}.collectives.json").write_text(json.dumps(flight_recorder.traces(), indent=1))
        except OSError as error:
            self._say(f"stacks and collectives cannot be written: {error}")

    def _leave(self) -> NoReturn:
        """Ends this process from the watchdog's thread: its main thread may wait forever."""
        self._leave_behind()
        os._exit(EXIT_CODE)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _line(error: BaseException) -> str:
    """The first sentence of an error's last line."""
    return (str(error).splitlines() or [type(error).__name__])[-1].split(". ")[0]
