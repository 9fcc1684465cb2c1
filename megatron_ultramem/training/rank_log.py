"""One log file per rank, <run_dir>/logs/rank_00003.log, with rank, host and step in every line, rotated by size.

What the progress line tells the terminal of one rank, warnings, and the error that a run ends in, are in it. Secrets of
the environment are hidden, there and in what goes to the terminal.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import UserError
from megatron_ultramem.redaction import redact

PACKAGE = "megatron_ultramem"
logger = logging.getLogger(__name__)


class RankLog:
    """Where the run stands, for the lines that follow."""

    def __init__(self) -> None:
        self.step = 0


@contextmanager
def rank_log(config: Config) -> Iterator[RankLog]:
    """Within it, this process logs to its file, and warnings to the terminal too. The file is made with its first line,
    so that a run that is refused leaves none."""
    log, rank = RankLog(), int(os.environ.get("RANK", "0"))
    path = Path(config.train.run_dir) / "logs" / f"rank_{rank:05d}.log"
    size = int(config.logging.rank_log_mib * 2**20)
    file = _File(path, maxBytes=size, backupCount=config.logging.rank_log_files - 1, delay=True, encoding="utf-8")
    file.setFormatter(_Lines(log, rank))
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(_Redacted("%(message)s"))
    package, root = logging.getLogger(PACKAGE), logging.getLogger()
    level = package.level
    package.setLevel(logging.INFO)
    root.addHandler(file)
    root.addHandler(terminal)
    try:
        yield log
    except BaseException as error:
        if file.stream is not None:
            root.removeHandler(terminal)  # where it is printed by others
            # A UserError says all there is to say; its traceback would not help.
            logger.error("ended by %s: %s", type(error).__name__, error, exc_info=not isinstance(error, UserError))
        raise
    finally:
        root.removeHandler(terminal)
        root.removeHandler(file)
        file.close()
        package.setLevel(level)


class _File(RotatingFileHandler):
    def _open(self) -> TextIO:  # type: ignore[override]
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


class _Redacted(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _Lines(_Redacted):
    """Rank and step in every line, also in the lines of a traceback."""

    def __init__(self, log: RankLog, rank: int) -> None:
        super().__init__("%(message)s")
        self._log, self._rank, self._host = log, rank, socket.gethostname()

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        name = record.name.removeprefix(f"{PACKAGE}.")
        head = (
            f"{when}.{record.msecs:03.0f}Z {record.levelname} rank {self._rank} {self._host} step {self._log.step} "
            f"{name}: "
        )
        return "\n".join(head + line for line in super().format(record).splitlines())
