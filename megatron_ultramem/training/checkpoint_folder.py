"""Checkpoints as folders on disk: which are whole, how one becomes whole, which are dropped. Plain file operations.

    step_00000100               a whole checkpoint
    .saving-step_00000100-…     being written, or left behind by a run that was killed
    .deleting-step_00000100     being deleted, likewise
    step_00000100.abandoned     of a branch that the run left by starting again from an earlier checkpoint

A checkpoint gets its name by one rename after every rank has finished writing and the files are on the disk, and loses
it by another before its first file is deleted: a folder called step_N is whole whenever a run is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from megatron_ultramem.config.load import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import CheckpointError, ConfigError

_NAME = re.compile(r"step_(\d+)")
_DRAFT, _DOOMED, _PROBE = ".saving-", ".deleting-", ".write-test-"
# What Megatron's torch_dist format writes beside the shards, and our two files.
_REQUIRED = ("run.json", "config.yaml", "metadata.json", ".metadata", "common.pt")


@dataclass(frozen=True)
class Record:
    """run.json of a checkpoint: what is neither a tensor nor a setting."""

    step: int
    consumed_samples: int
    consumed_tokens: int
    tokenizer: str  # identity of the tokenizer
    vocab_size: int  # before padding
    layout: Mapping[str, int]  # what decides whether RNG states fit
    shuffles: Mapping[str, str]  # checksum of the shuffle permutation of each memory layer, by its number
    versions: Mapping[str, str]
    saved_at: str  # UTC
    weights_only: bool = False  # converted from another format: there is no optimizer state

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def checkpoint_dir(config: Config) -> Path:
    """Folder of this run's checkpoints."""
    return Path(config.checkpoint.dir or Path(config.train.run_dir) / "checkpoints")


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in `folder`, in the order of their steps."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint from its own path, a folder of checkpoints, or a run folder (then the newest one there)."""
    path = Path(path)
    if (path / "run.json").is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if found := list_checkpoints(folder):
            return found[-1]
    raise CheckpointError(f"{path}: no checkpoint there; legal: a step_N folder, a folder of them, or a run folder")


def wanted_checkpoint(config: Config) -> Path | None:
    """The checkpoint that `checkpoint.load` asks for; None: start afresh."""
    wish = config.checkpoint.load
    if wish == "none":
        return None
    if wish == "auto":
        found = list_checkpoints(checkpoint_dir(config))
        return found[-1] if found else None
    return resolve_checkpoint(wish)


def read_record(folder: Path) -> Record:
    """run.json of a checkpoint; raises CheckpointError if it or another file is missing, or it is damaged."""
    missing = [name for name in _REQUIRED if not (folder / name).is_file()]
    if missing or not any(folder.glob("*.distcp")):
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {', '.join(missing) or 'every .distcp file'} is missing; "
            "legal: another one as checkpoint.load"
        )
    try:
        content = json.loads((folder / "run.json").read_text())
        record = Record(
            **{
                field.name: content[field.name]
                for field in fields(Record)
                if field.default is MISSING or field.name in content
            }
        )
        numbers = (record.step, record.consumed_samples, record.consumed_tokens, record.vocab_size)
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError("a count is not an integer")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"checkpoint {folder} is damaged: run.json cannot be read ({reason}); legal: another one as checkpoint.load"
        ) from None
    return record


def read_config(folder: Path) -> Config:
    """The settings that a checkpoint was trained with; raises CheckpointError if they cannot be read."""
    try:
        return load_config(folder / "config.yaml", check=False)
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {folder}: its settings cannot be read: {error}") from None


def check_writable(folder: Path, setting: str) -> None:
    """Makes the folder; raises CheckpointError before training if it could not be written to, naming the setting."""
    probe = folder / f"{_PROBE}{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"{setting} = {folder} cannot be written: {error.strerror or error}; legal: a writable folder"
        ) from None


def remove_leftovers(folder: Path) -> None:
    """Deletes what killed runs left half written or half deleted. For one rank, before the first save."""
    for pattern in (_DRAFT, _DOOMED):
        for path in folder.glob(f"{pattern}*"):
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{_PROBE}*"):
        path.unlink(missing_ok=True)


def new_draft(target: Path, token: str) -> Path:
    """The folder in which `target` is written. The token keeps writers that outlive a killed run out of it."""
    return target.with_name(f"{_DRAFT}{target.name}-{token}")


def publish(draft: Path, target: Path, keep_last: int) -> None:
    """Gives a finished draft its name, then drops the oldest checkpoints.

    Checkpoints of the same step and later ones are of a branch that this run has left: they are renamed, not deleted,
    and no longer count as the newest.

    Args:
        keep_last: checkpoints kept; 0: all.
    """
    for file in (*draft.iterdir(), draft):
        _sync(file)
    for abandoned in list_checkpoints(target.parent):
        if _step(abandoned) >= _step(target):
            os.replace(abandoned, _free_name(abandoned.with_name(f"{abandoned.name}.abandoned")))
    os.replace(draft, target)
    _sync(target.parent)
    for old in list_checkpoints(target.parent)[:-keep_last] if keep_last else []:
        doomed = old.with_name(f"{_DOOMED}{old.name}")
        os.replace(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _free_name(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _sync(path: Path) -> None:
    """Forces a file or folder to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
