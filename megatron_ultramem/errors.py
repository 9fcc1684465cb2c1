"""The errors that a user is meant to read: raised with one clear message, printed by the CLI without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right. The message names the setting or file, its value, and what would be legal."""

    on_every_rank = False  # raised alike on all ranks, as a rule
    on_many_ranks = False  # found by each rank for itself: by all, or by those of one host; one of them prints it
    exit_code = 2


class ConfigError(UserError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one."""

    on_every_rank = on_many_ranks = True


class DataError(UserError):
    """Training data is missing, damaged, or does not fit the tokenizer or the model."""

    on_many_ranks = True


class CheckpointError(UserError):
    """A checkpoint cannot be written, is missing or damaged, or belongs to another model."""

    on_every_rank = on_many_ranks = True


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint are missing, or are not what was written."""


class TrainingError(UserError):
    """Training cannot go on (for example a loss that is not finite)."""

    on_every_rank = on_many_ranks = True


class ExchangeError(UserError):
    """A rank of the memory-parallel group ended or did not answer. Raised by the ranks that are left."""


class LaunchError(UserError):
    """A job could not be submitted to a cluster."""


class LostRankError(UserError):
    """Another rank ended without a word. Raised by one of the ranks that are left, which names it."""

    exit_code = 3


def lost_another_rank(error: BaseException) -> bool:
    """Whether a collective failed because its other end is gone or did not answer."""
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "remote process exited",
        "Timed out waiting",
        "NCCL communicator was aborted",
    )
    if isinstance(error, ExchangeError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def exit_status(action: Callable[[], int | None]) -> int:
    """Of a command that does `action`: what that returns, 0 for None, or 2 with a printed UserError."""
    try:
        return action() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
