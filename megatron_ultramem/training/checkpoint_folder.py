"""Checkpoints as folders on disk: which are whole, how one becomes whole, which are dropped. Plain file operations.

    step_00000100               a whole checkpoint
    .saving-step_00000100-…     being written, or left behind by a run that was killed
    .deleting-step_00000100     being deleted, likewise
    step_00000100.abandoned     of a branch that the run left by starting again from an earlier checkpoint
    step_00000100.damaged       found damaged when a run resumed, which then took the one before
    latest                      a link to the newest whole checkpoint

A checkpoint gets its name by one rename after every rank has finished writing and the files are on the disk, and loses
it by another before its first file is deleted: a folder called step_N is whole whenever a run is killed. `latest` moves
after the one rename and before the other, so it leads to a whole checkpoint at every moment; a run killed in between
leaves it one checkpoint behind until it resumes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

from megatron_ultramem.config.load import load_config
from megatron_ultramem.config.schema import Config
from megatron_ultramem.errors import CheckpointError, ConfigError, DamagedCheckpointError
from megatron_ultramem.training.restarts import is_restart, launch_id

_NAME = re.compile(r"step_(\d+)")
LATEST = "latest"
_DRAFT, _DOOMED, _PROBE, _LINK = ".saving-", ".deleting-", ".write-test-", ".latest-"
# What Megatron's torch_dist format writes beside the shards, and our two files.
_REQUIRED = ("run.json", "config.yaml", "metadata.json", ".metadata", "common.pt")

NOT_WEIGHTS = ("optimizer", "rng")
"""How the names of entries begin that do not belong to the model."""


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
    recent_losses: tuple[float, ...] = ()  # of the last good steps, where leaps of the loss are looked for
    launch: str = ""  # identity of the launch that saved it (`restarts.launch_id`)

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
    if path.is_symlink():
        path = path.resolve()  # `latest` may move on while the checkpoint is read
    if (path / "run.json").is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if found := list_checkpoints(folder):
            return found[-1]
    raise CheckpointError(f"{path}: no checkpoint there; legal: a step_N folder, a folder of them, or a run folder")


def wanted_checkpoints(config: Config) -> list[Path]:
    """The checkpoints that `checkpoint.load` asks for, the one to try first in front; empty: start afresh.

    There are several with "auto" alone, where a damaged checkpoint gives way to the one before.
    """
    wish = config.checkpoint.load
    if wish == "none":
        return []
    if wish == "auto":
        return list_checkpoints(checkpoint_dir(config))[::-1]
    return [resolve_checkpoint(wish)]


def own_checkpoints(config: Config) -> list[Path]:
    """After a restart: what this launch has saved before, the newest first; else empty. To be asked on rank 0."""
    launch = launch_id()
    if not launch or not is_restart():
        return []
    return [path for path in list_checkpoints(checkpoint_dir(config))[::-1] if _saved_by(path) == launch]


def _saved_by(folder: Path) -> str:
    try:
        return str(json.loads((folder / "run.json").read_text()).get("launch", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def read_record(folder: Path) -> Record:
    """run.json of a checkpoint; raises DamagedCheckpointError if it or another file is missing, or it is damaged."""
    missing = [name for name in _REQUIRED if not (folder / name).is_file()]
    if missing or not any(folder.glob("*.distcp")):
        raise DamagedCheckpointError(
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
        record = replace(record, recent_losses=tuple(record.recent_losses))
        numbers = (record.step, record.consumed_samples, record.consumed_tokens, record.vocab_size)
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError("a count is not an integer")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DamagedCheckpointError(
            f"checkpoint {folder} is damaged: run.json cannot be read ({reason}); legal: another one as checkpoint.load"
        ) from None
    return record


def read_config(folder: Path) -> Config:
    """The settings that a checkpoint was trained with; raises DamagedCheckpointError if they cannot be read."""
    try:
        return load_config(folder / "config.yaml", check=False)
    except ConfigError as error:
        raise DamagedCheckpointError(f"checkpoint {folder}: its settings cannot be read: {error}") from None


def is_extra_state(key: str) -> bool:
    """Whether a name is Transformer Engine's state of a module (FP8 scales), which local modules do not have."""
    return "_extra_state" in key


def is_weight(key: str) -> bool:
    """Whether an entry of a checkpoint belongs to the model, and is not optimizer, random or FP8 state."""
    return not key.startswith(NOT_WEIGHTS) and not is_extra_state(key)


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
    """Deletes what killed runs left half written or half deleted, and lets `latest` catch up. For one rank, before the
    first save."""
    for pattern in (_DRAFT, _DOOMED):
        for path in folder.glob(f"{pattern}*"):
            shutil.rmtree(path, ignore_errors=True)
    for pattern in (_PROBE, _LINK):
        for path in folder.glob(f"{pattern}*"):
            path.unlink(missing_ok=True)
    if folder.is_dir():
        _point_latest(folder, list_checkpoints(folder))


def set_aside(damaged: Path) -> Path:
    """Renames a damaged checkpoint, which then no longer counts; returns its new path."""
    aside = _free_name(damaged.with_name(f"{damaged.name}.damaged"))
    _point_latest(damaged.parent, [path for path in list_checkpoints(damaged.parent) if path != damaged])
    os.replace(damaged, aside)
    return aside


def new_draft(target: Path, token: str) -> Path:
    """The folder in which `target` is written. The token keeps writers that outlive a killed run out of it."""
    return target.with_name(f"{_DRAFT}{target.name}-{token}")


def publish(draft: Path, target: Path, keep_last: int, keep_every: int = 0) -> None:
    """Gives a finished draft its name, then drops the oldest checkpoints.

    Checkpoints of the same step and later ones are of a branch that this run has left: they are renamed, not deleted,
    and no longer count as the newest.

    Args:
        keep_last: checkpoints kept; 0: all.
        keep_every: those of multiples of this step are kept beside them; 0: none.
    """
    for file in (*draft.iterdir(), draft):
        _sync(file)
    existing = list_checkpoints(target.parent)
    before = [path for path in existing if _step(path) < _step(target)]
    if len(before) < len(existing):
        _point_latest(target.parent, before)
    for abandoned in existing[len(before) :]:
        os.replace(abandoned, _free_name(abandoned.with_name(f"{abandoned.name}.abandoned")))
    os.replace(draft, target)
    _point_latest(target.parent, [target])
    _sync(target.parent)
    for old in [*before, target][:-keep_last] if keep_last else []:
        if keep_every and _step(old) % keep_every == 0:
            continue
        doomed = old.with_name(f"{_DOOMED}{old.name}")
        os.replace(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def discard(draft: Path) -> None:
    """Deletes the draft of a save that failed: what it holds may be what filled the disk."""
    shutil.rmtree(draft, ignore_errors=True)


def _point_latest(folder: Path, checkpoints: list[Path]) -> None:
    """Lets `latest` lead to the last of `checkpoints`, in one rename; without any there is no `latest`, nor on file
    systems without links."""
    link, temporary = folder / LATEST, folder / f"{_LINK}{os.getpid()}"
    if link.is_dir() and not link.is_symlink():  # the run folder was copied with its links followed
        os.replace(link, _free_name(link.with_name(f"{LATEST}.copied")))
    if not checkpoints:
        link.unlink(missing_ok=True)
        return
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(checkpoints[-1].name)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP):
            raise
        return
    os.replace(temporary, link)


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
