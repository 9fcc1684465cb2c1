"""A folder that appears whole or not at all: it is written beside its place and gets its name by one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ultramem.errors import CheckpointError


@contextmanager
def new_folder(target: Path, nbytes: int) -> Iterator[Path]:
    """Yields an empty folder beside `target`; renames it at the end, or deletes it where anything was raised.

    Args:
        nbytes: that will be written, to refuse a disk that is too small before it is full.

    Raises:
        CheckpointError: the target exists, its place cannot be written to, or the disk is or becomes full.
    """
    check_free(target)
    draft = target.with_name(f".converting-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
    except FileExistsError:
        raise CheckpointError(
            f"{draft} exists: another conversion is writing there, or one was killed; legal: delete that folder if "
            "none is running"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from None
    try:
        _check_room(draft, target, nbytes)
        yield draft
        for file in (*draft.iterdir(), draft):
            _sync(file)
        os.replace(draft, target)
        _sync(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}; nothing of it is left, and the source is as it was"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # gone if it was renamed


def check_free(target: Path) -> None:
    """Raises CheckpointError if something is at `target` already; an empty folder does not count."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise CheckpointError(f"{target} exists already; legal: a folder that does not, or an empty one")


def _check_room(draft: Path, target: Path, nbytes: int) -> None:
    free = shutil.disk_usage(draft).free
    if free < nbytes:
        raise CheckpointError(
            f"{target} needs {nbytes / 2**30:.2f} GiB, and its disk has {free / 2**30:.2f} GiB left; legal: another "
            "place, or room on this one"
        )


def _sync(path: Path) -> None:
    """Forces a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
